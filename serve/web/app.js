// The page: what its controls do.

import { advise } from "./advice.js";
import { explain, worthAnotherTry } from "./errors.js";
import { Live } from "./live.js";
import { Numbers } from "./numbers.js";
import { Prompts } from "./prompts.js";
import { Recorder } from "./recorder.js";
import { offers, parsed, seconds, sent, workSize } from "./sizes.js";
import { Source, cameras, canShareScreen } from "./source.js";
import { Stage } from "./stage.js";
import { editWhole } from "./whole.js";

const get = (id) => document.getElementById(id);
const show = (id, shown) => get(id).classList.toggle("hidden", !shown);
const radio = (value) => document.querySelector(`input[name=from][value=${value}]`);
const START = { sample: "Edit this clip", camera: "Start", screen: "Start", file: "Edit it live" };
const SPARE_S = 0.3; // of the first edit, for network and pictures
const RETRY_S = 5;

const stage = new Stage();
const numbers = new Numbers();
const prompts = new Prompts(get("prompt"), get("chips"), get("unknown"), () => run && apply());

let model = null; // as /v1/models has it
let samples = {};
let source = null; // what is chosen and previewed
let run = null; // the session that goes on
let upload = null; // AbortController of the file that is edited whole
let recorder = null;
let retrying = null; // the interval that counts down to another try
let work = ""; // the working size that is chosen; empty is the server's choice
let after = null; // what to do when the session has ended, instead of showing the preview

// A token given in the address (better behind # than behind ?, which goes to the server) is taken
// out of it, so that it is not in the history, a bookmark or a screenshot; this tab remembers it.
function takeToken() {
  const url = new URL(location.href);
  const given = new URLSearchParams(url.hash.slice(1)).get("token") || url.searchParams.get("token");
  if (given) {
    sessionStorage.setItem("token", given);
    url.hash = "";
    url.searchParams.delete("token");
    history.replaceState(null, "", url);
  }
  get("token").value = sessionStorage.getItem("token") || "";
}

async function findModel() {
  const token = get("token").value;
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  try {
    const answer = await fetch("v1/models", { headers });
    if (!answer.ok) {
      get("model").textContent = answer.status === 401 ? "needs a token" : "getting ready";
      return setTimeout(findModel, 2000);
    }
    model = (await answer.json()).models[0];
  } catch {
    get("model").textContent = "no answer from the server";
    return setTimeout(findModel, 2000);
  }
  get("model").textContent = `${model.name} on ${model.device}`;
  prompts.offer(model.card ?? {});
  if (!source) await firstSource();
  welcome();
}

// The clip that the model's card names, else the first; without any the camera is proposed.
async function firstSource() {
  samples = await fetch("samples/samples.json").then((answer) => answer.json());
  const name = model.card?.sample in samples ? model.card.sample : Object.keys(samples)[0];
  get("sources").dataset.sample = name ?? "";
  if (!source && name) await choose("sample");
}

async function open(kind) {
  const video = document.createElement("video");
  video.muted = true;
  video.playsInline = true;
  if (kind === "sample") {
    return Source.sample(`samples/${samples[get("sources").dataset.sample].file}`, video);
  }
  if (kind === "file") return Source.file(get("file").files[0], video);
  if (kind === "screen") return Source.screen(video);
  const camera = await Source.camera(get("device").value, video);
  camera.mirrored = get("mirror").getAttribute("aria-pressed") === "true";
  await listCameras(video.srcObject);
  return camera;
}

// The new source is there before the old one goes; a session goes on with it.
async function choose(kind) {
  complain(null);
  show("file", kind === "file");
  if (kind === "file" && !get("file").files[0]) return run || complain(new Error("Choose a video file first."));
  let next;
  try {
    next = await open(kind);
  } catch (error) {
    complain(error);
    if (source) radio(source.kind).checked = true;
    show("file", source?.kind === "file");
    return;
  }
  radio(kind).checked = true;
  show("device", kind === "camera" && get("device").options.length > 1);
  const use = () => {
    source?.stop();
    source = next;
    stage.preview(source);
    welcome();
  };
  if (!run) return use();
  after = () => {
    use();
    start();
  };
  run.stop();
}

async function listCameras(stream) {
  const used = stream.getVideoTracks()[0].getSettings().deviceId;
  get("device").replaceChildren(
    ...(await cameras()).map(({ label, deviceId }, n) =>
      new Option(label || `camera ${n + 1}`, deviceId, false, deviceId === used)),
  );
}

// What can be started, over the picture.
function welcome(text = null) {
  const kind = source?.kind;
  get("play").textContent = get("start").textContent = START[kind] ?? "Start";
  show("play", !!source);
  show("whole", kind === "file");
  show("apply", false);
  stage.say(text);
  if (!text && source && model) {
    offerWork();
    const first = model.first_chunk_frames / rate() + chunkSeconds() + SPARE_S;
    get("note").textContent = `first edit in about ${Math.ceil(first)} s`;
    warn(chunkSeconds());
  }
}

const rate = () => Number(get("rate").value) || model.fps;

// What is sent and comes back: the source's own size, unless Settings says otherwise.
function size() {
  const own = sent(source.size, model, rate());
  return {
    width: Number(get("width").value) || own.width,
    height: Number(get("height").value) || own.height,
  };
}

const working = () => workSize(work || model.work_size, size(), model);
const chunkSeconds = () => seconds(size(), working(), model);

// The choice is there where there is one.
function offerWork() {
  const found = offers(size(), model, rate());
  if (work && !found.some(({ value }) => value === work)) found.push({ value: work, text: work });
  const options = found.map(({ value, text }) => new Option(text, value, false, value === work));
  get("work").replaceChildren(...options);
  show("working", found.length > 1);
}

function warn(seconds) {
  const advice = seconds && advise({ seconds, frames: model.chunk_frames, fps: rate(), ...working() });
  show("advice", !!advice);
  if (!advice) return;
  get("advice-text").textContent = advice.text;
  get("slower").textContent = `Send ${advice.fps} frames a second`;
  get("slower").onclick = () => change({ rate: advice.fps });
  show("smaller", !!advice.work);
  get("smaller").textContent = `Edit at ${advice.work}, with the source's detail`;
  get("smaller").onclick = () => {
    work = advice.work;
    change({});
  };
}

// Settings count from the next start, which is now where one goes on.
function change(values) {
  for (const [field, value] of Object.entries(values)) get(field).value = value;
  numbers.clear();
  if (!run) return welcome();
  after = start;
  run.stop();
}

function state(text, kind = "") {
  get("state").textContent = text;
  get("state").dataset.state = kind;
}

// Says what is wrong, and tries again by itself where a place will come free.
function complain(error) {
  clearInterval(retrying);
  show("error", !!error);
  if (!error) return;
  const text = explain(error);
  get("error-text").textContent = text;
  show("retry", worthAnotherTry(error));
  get("retry").textContent = "Try again";
  if (error.code !== "at_capacity") return;
  let left = Math.ceil(error.retry_after_s ?? RETRY_S);
  const count = () => {
    get("retry").textContent = `Try again (by itself in ${left} s)`;
    if (left-- <= 0) start();
  };
  count();
  retrying = setInterval(count, 1000);
}

// Whether every field holds what it may; says at the first that does not what is wrong.
function filledIn() {
  const wrong = get("controls").querySelector("input:invalid");
  const hidden = wrong && wrong.closest("details");
  if (hidden) hidden.open = true;
  return get("controls").reportValidity();
}

async function start() {
  if (run || upload || !filledIn()) return;
  complain(null);
  if (!model) return complain({ code: get("model").textContent === "needs a token" ? "unauthorized" : "unreachable" });
  const wanted = document.querySelector("input[name=from]:checked")?.value ?? "camera";
  if (source?.kind !== wanted || source.ended) await choose(wanted);
  if (source?.kind !== wanted || source.ended) return;
  numbers.clear();
  prompts.used();
  show("saved", false);
  show("advice", false);
  const open = {
    type: "open", prompt: prompts.value, ...size(), fps: rate(), mode: "live", format: "jpeg",
    seed: Number(get("seed").value) || 0, mask: true, queue: true,
    ...(work && { work_size: work }),
  };
  stage.begin(open.width, open.height);
  stage.say("connecting");
  get("start").textContent = "Stop";
  get("start").classList.remove("primary");
  show("apply", true);
  show("whole", false);
  run = new Live(source, open, get("token").value, {
    state(text, kind) {
      state(text, kind);
      get("apply").disabled = get("record").disabled = text !== "live";
      if (text === "live" && stage.root.dataset.showing !== "edit") stage.say("the first edit is coming");
    },
    edited(delayMs, picture, from) {
      if (stage.root.dataset.showing !== "edit") stage.say(null);
      stage.draw(picture, from, get("mask").checked);
      numbers.frame(delayMs);
    },
    message: hear,
    ended: end,
  });
}

function hear(message) {
  if (message.type === "opened") stage.overlay.work = parsed(message.work_size);
  else if (message.type === "mask") stage.overlay.take(message);
  else if (message.type === "dropped") numbers.drop(message.frames);
  else if (message.type === "prompt_applied") run.on.state("live", "live");
  else if (message.type === "chunk") {
    numbers.chunk(message);
    warn(numbers.chunkSeconds);
  } else if (message.type === "queued") {
    const seconds = Math.ceil(message.expected_s);
    state(`waiting, place ${message.place}`, "busy");
    stage.say(`All places are taken. You are number ${message.place}: about ${seconds} s.`);
  }
}

async function end(error) {
  run = null;
  await stopRecording();
  state("ready");
  get("start").classList.add("primary");
  get("apply").disabled = get("record").disabled = true;
  if (source.ended) {
    source.stop();
    source = null;
  } else stage.preview(source);
  welcome();
  const then = after;
  after = null;
  if (error) complain(error);
  else if (then) then();
}

function apply() {
  if (!run || !get("prompt").reportValidity()) return;
  prompts.used();
  run.setPrompt(prompts.value);
}

async function whole() {
  if (run || upload || !filledIn()) return;
  complain(null);
  prompts.used();
  upload = new AbortController();
  state("editing the file", "busy");
  stage.say("sending the file");
  get("start").textContent = "Stop";
  show("whole", false);
  const { duration } = source.video;
  try {
    const edited = await editWhole(get("file").files[0], {
      prompt: prompts.value, seed: Number(get("seed").value) || 0, token: get("token").value, work,
      signal: upload.signal,
      progress: (s) => stage.say(`${s.toFixed(1)} of ${duration.toFixed(1)} s are edited`),
    });
    welcome();
    stage.result(edited);
    offer(edited, `${get("file").files[0].name.replace(/\.\w+$/, "")}-edited.mp4`, "the edited file");
  } catch (error) {
    welcome();
    if (error.name !== "AbortError") complain(error);
  }
  upload = null;
  state("ready");
}

function offer(blob, name, what) {
  const link = get("download");
  URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(blob);
  link.download = name;
  const { size } = blob;
  const text = size < 1e6 ? `${Math.ceil(size / 1e3)} kB` : `${(size / 1e6).toFixed(1)} MB`;
  link.textContent = `Save ${what} (${text})`;
  show("saved", true);
}

async function stopRecording() {
  if (!recorder) return;
  const stopping = recorder;
  recorder = null;
  get("record").textContent = "Record";
  get("record").setAttribute("aria-pressed", "false");
  offer(await stopping.stop(), "liveedit.webm", "the recording");
}

function startOrStop() {
  if (upload) upload.abort();
  else if (run) run.stop();
  else start();
}

get("controls").addEventListener("submit", (event) => event.preventDefault());
get("start").addEventListener("click", startOrStop);
get("play").addEventListener("click", start);
get("whole").addEventListener("click", whole);
get("retry").addEventListener("click", start);
get("apply").addEventListener("click", apply);
get("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  if (run) apply();
  else start();
});
get("record").addEventListener("click", () => {
  if (recorder) return stopRecording();
  recorder = new Recorder(stage.edited);
  get("record").textContent = "Stop recording";
  get("record").setAttribute("aria-pressed", "true");
});
get("mirror").addEventListener("click", () => {
  const mirrored = get("mirror").getAttribute("aria-pressed") !== "true";
  get("mirror").setAttribute("aria-pressed", String(mirrored));
  if (!source) return;
  source.mirrored = mirrored;
  get("preview").classList.toggle("mirrored", mirrored);
});
for (const input of document.querySelectorAll("input[name=from]")) {
  input.addEventListener("change", () => choose(input.value));
}
get("file").addEventListener("change", () => choose("file"));
get("device").addEventListener("change", () => choose("camera"));
get("work").addEventListener("change", () => {
  work = get("work").value;
  change({});
});
for (const field of ["width", "height", "rate"]) {
  get(field).addEventListener("change", () => run || !source || welcome());
}
takeToken();
get("token").addEventListener("change", () => {
  sessionStorage.setItem("token", get("token").value);
  findModel();
});
addEventListener("pagehide", () => run && run.stop());
if (!canShareScreen()) radio("screen").parentElement.remove();
if (!Recorder.supported) show("record", false);
findModel();
