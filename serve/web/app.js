// The page: controls, the loop that sends frames, and what is shown.

import { Camera } from "./camera.js";
import { explain } from "./errors.js";
import { Numbers } from "./numbers.js";
import { Overlay } from "./overlay.js";
import { Recorder } from "./recorder.js";
import { Session, streamUrl } from "./wire.js";

const get = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;
const numbers = new Numbers();
const overlay = new Overlay();
const shown = { source: get("source"), edited: get("edited") };
const KEPT = 240; // source frames that wait for their edit

let model = { width: 832, height: 480, fps: 16 };
let run = null; // the session that goes on
let recorder = null;

async function findModel() {
  const token = get("token").value;
  try {
    const answer = await fetch("v1/models" + (token ? `?token=${encodeURIComponent(token)}` : ""));
    if (!answer.ok) {
      get("model").textContent = answer.status === 401 ? "needs a token" : "getting ready";
      return setTimeout(findModel, 2000);
    }
    model = (await answer.json()).models[0];
    get("model").textContent = `${model.name} on ${model.device}`;
  } catch {
    get("model").textContent = "no answer from the server";
    return setTimeout(findModel, 2000);
  }
  for (const [field, value] of [["width", model.width], ["height", model.height], ["rate", model.fps]]) {
    if (!get(field).value) get(field).value = value;
  }
  for (const canvas of Object.values(shown)) {
    canvas.style.aspectRatio = `${get("width").value} / ${get("height").value}`;
  }
}

function state(text, kind = "") {
  get("state").textContent = text;
  get("state").dataset.state = kind;
}

function waiting({ place, expected_s }) {
  state(`waiting, place ${place}, about ${Math.ceil(expected_s)} s`, "busy");
}

function complain(error) {
  get("error").textContent = error ? explain(error) : "";
  get("error").classList.toggle("hidden", !error);
}

// Whether every field holds what it may; says at the first that does not what is wrong.
function filledIn() {
  const wrong = get("controls").querySelector("input:invalid");
  const hidden = wrong && wrong.closest("details");
  if (hidden) hidden.open = true;
  return get("controls").reportValidity();
}

async function start() {
  complain(null);
  if (get("start").disabled || !filledIn()) return;
  numbers.clear();
  const width = Number(get("width").value) || model.width;
  const height = Number(get("height").value) || model.height;
  const fps = Number(get("rate").value) || model.fps;
  get("start").disabled = true;
  let camera;
  try {
    camera = await Camera.open(chosen("from"), get("file").files[0]);
  } catch (error) {
    complain(error);
    get("start").disabled = false;
    return;
  }
  for (const canvas of Object.values(shown)) {
    canvas.width = width;
    canvas.height = height;
    canvas.style.aspectRatio = `${width} / ${height}`;
  }
  const picture = new OffscreenCanvas(width, height);
  run = { camera, width, height, fps, picture, context: picture.getContext("2d"), sources: new Map() };
  state("connecting", "busy");
  const open = {
    type: "open", prompt: get("prompt").value, width, height, fps, mode: "live", format: "jpeg",
    seed: Number(get("seed").value) || 0, mask: true, queue: true,
  };
  run.session = new Session(streamUrl(get("token").value), open, handlers(run));
  get("start").disabled = false;
  get("start").textContent = "Stop";
}

function handlers(run) {
  let showing = Promise.resolve(); // pictures are decoded and drawn in order
  return {
    opened() {
      state("live", "live");
      run.sources.forEach((picture) => picture.close());
      run.sources.clear();
      get("apply").disabled = false;
      get("record").disabled = !Recorder.supported;
      if (!run.timer) film(run);
    },
    frame(index, timeUs, image) {
      showing = showing.then(() => show(run, index, timeUs, image)).catch(complain);
    },
    message(message) {
      if (message.type === "mask") showing = showing.then(() => overlay.take(message));
      else if (message.type === "chunk") numbers.chunk(message);
      else if (message.type === "queued") waiting(message);
      else if (message.type === "dropped") numbers.drop(message.frames);
      else if (message.type === "prompt_applied") state("live", "live");
    },
    lost() {
      state("connection lost, reconnecting", "busy");
    },
    ended(error) {
      showing.then(() => end(run, error));
    },
  };
}

// Sends frames at the session's rate; a frame that the network cannot take is left out.
function film(run) {
  const began = performance.now();
  let tick = 0;
  let busy = false;
  run.timer = setInterval(async () => {
    if (run.camera.ended) return stop();
    const due = Math.floor(((performance.now() - began) * run.fps) / 1000);
    if (due < tick || busy || !run.session.room || run.stopping) return;
    tick = due + 1;
    busy = true;
    try {
      run.camera.draw(run.context, run.width, run.height);
      const timeUs = Math.round(performance.now() * 1000);
      const source = await createImageBitmap(run.picture);
      const blob = await run.picture.convertToBlob({ type: "image/jpeg", quality: 0.9 });
      const image = await blob.arrayBuffer();
      if (!run.session.room || run.stopping) return source.close();
      run.sources.set(run.session.send(image, timeUs), source);
      forget(run, run.session.next - KEPT);
    } finally {
      busy = false;
    }
  }, 1000 / run.fps / 3);
}

function forget(run, before) {
  for (const [index, picture] of run.sources) {
    if (index >= before) return;
    picture.close();
    run.sources.delete(index);
  }
}

async function show(run, index, timeUs, image) {
  const picture = await createImageBitmap(image);
  const context = shown.edited.getContext("2d");
  context.drawImage(picture, 0, 0);
  picture.close();
  overlay.draw(context, run.width, run.height, get("mask").checked);
  const source = run.sources.get(index);
  if (source) shown.source.getContext("2d").drawImage(source, 0, 0);
  forget(run, index + 1);
  numbers.frame(performance.now() - timeUs / 1000);
}

function stop() {
  if (!run || run.stopping) return;
  run.stopping = true;
  clearInterval(run.timer);
  state("finishing", "busy");
  get("start").disabled = true;
  run.session.finish();
}

async function end(ended, error) {
  clearInterval(ended.timer);
  ended.camera.stop();
  ended.sources.forEach((picture) => picture.close());
  run = null;
  await stopRecording();
  state("not connected");
  complain(error);
  get("start").textContent = "Start";
  get("start").disabled = false;
  get("apply").disabled = get("record").disabled = true;
}

async function stopRecording() {
  if (!recorder) return;
  const stopping = recorder;
  recorder = null;
  get("record").textContent = "Record";
  get("record").setAttribute("aria-pressed", "false");
  const recording = await stopping.stop();
  const link = get("download");
  URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(recording);
  const size = recording.size;
  const text = size < 1e6 ? `${Math.ceil(size / 1e3)} kB` : `${(size / 1e6).toFixed(1)} MB`;
  link.textContent = `Save the recording (${text})`;
  link.classList.remove("hidden");
}

function apply() {
  if (!run || !get("prompt").reportValidity()) return;
  state("changing the instruction", "busy");
  run.session.setPrompt(get("prompt").value);
}

get("controls").addEventListener("submit", (event) => event.preventDefault());
get("start").addEventListener("click", () => (run ? stop() : start()));
get("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  if (run) apply();
  else start();
});
get("apply").addEventListener("click", apply);
get("record").addEventListener("click", () => {
  if (recorder) return stopRecording();
  recorder = new Recorder(shown.edited);
  get("record").textContent = "Stop recording";
  get("record").setAttribute("aria-pressed", "true");
});
for (const input of document.querySelectorAll("input[name=from]")) {
  input.addEventListener("change", () => get("file").classList.toggle("hidden", chosen("from") !== "file"));
}
for (const input of document.querySelectorAll("input[name=view]")) {
  input.addEventListener("change", () => {
    get("stage").dataset.view = chosen("view");
    get("divider-label").classList.toggle("hidden", chosen("view") !== "slider");
  });
}
get("divider").addEventListener("input", () => {
  get("stage").style.setProperty("--divider", `${get("divider").value}%`);
});
get("token").value = new URLSearchParams(location.search).get("token") || "";
get("token").addEventListener("change", findModel);
addEventListener("pagehide", () => run && run.session.finish());
findModel();
