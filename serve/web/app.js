// The page: what its controls do, and when.

import { advise } from "./advice.js";
import { Chooser } from "./chooser.js";
import { Complaint } from "./complaint.js";
import { get, show } from "./dom.js";
import { Live } from "./live.js";
import { Numbers } from "./numbers.js";
import { Prompts } from "./prompts.js";
import { Saving } from "./saving.js";
import { offers, parsed, seconds, sent, unlikeTraining, workSize } from "./sizes.js";
import { Stage } from "./stage.js";
import { bearer, takeToken, token } from "./token.js";
import { editWhole } from "./whole.js";

const PLAY = { sample: "Edit this clip", camera: "Start", screen: "Start", file: "Edit it live" };
const SPARE_S = 0.3; // of the first edit, for network and pictures

const stage = new Stage();
const numbers = new Numbers();
const prompts = new Prompts(get("prompt"), get("chips"), get("unknown"), () => run && apply());
const chooser = new Chooser(choose);
const complaint = new Complaint(start);
const saving = new Saving(stage.edited);

let models = []; // as /v1/models has them, the first of every name
let model = null; // the one that is chosen
let source = null; // what is chosen and previewed
let run = null; // the session that goes on
let upload = null; // AbortController of the file that is edited whole
let work = ""; // the working size that is chosen; empty is the server's choice
let after = null; // what to do when the session has ended, instead of showing the preview

async function findModel() {
  try {
    const answer = await fetch("v1/models", { headers: bearer() });
    if (!answer.ok) {
      get("model").textContent = answer.status === 401 ? "needs a token" : "getting ready";
      return setTimeout(findModel, 2000);
    }
    const told = (await answer.json()).models;
    models = told.filter(({ model: name }, n) => told.findIndex((other) => other.model === name) === n);
  } catch {
    get("model").textContent = "no answer from the server";
    return setTimeout(findModel, 2000);
  }
  get("which").replaceChildren(...models.map(({ model: name }) => new Option(name, name)));
  show("which", models.length > 1);
  useModel(models[0]);
  if (!source && (await chooser.findSample(model.card))) await choose("sample");
  welcome();
}

function useModel(chosen) {
  model = chosen;
  work = "";
  get("model").textContent = model.device ? `${model.name} on ${model.device}` : `${model.name}, loaded at the first start`;
  prompts.offer(model.card ?? {});
}

// The new source is there before the old one goes; a session goes on with it.
async function choose(kind) {
  complaint.say(null);
  if (kind === "file") chooser.show(kind);
  if (kind === "file" && !chooser.file) return run || stage.say("choose a video file");
  let next;
  try {
    next = await chooser.open(kind);
  } catch (error) {
    complaint.say(error);
    return chooser.show(source?.kind ?? null);
  }
  chooser.show(kind);
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

// What can be started, over the picture.
function welcome(text = null) {
  const kind = source?.kind;
  get("play").textContent = PLAY[kind] ?? "Start";
  get("start").textContent = kind === "file" ? PLAY.file : "Start";
  show("play", !!source);
  show("whole", kind === "file");
  show("apply", false);
  stage.say(text);
  if (!text && source && model) {
    offerWork();
    get("unlike").textContent = unlikeTraining(working(), model);
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
  const less = advice.work && unlikeTraining(parsed(advice.work), model);
  get("smaller").textContent = `Edit at ${advice.work}, ${less ? "less well" : "with the source's detail"}`;
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

// Whether every field holds what it may; says at the first that does not what is wrong.
function filledIn() {
  const wrong = get("controls").querySelector("input:invalid");
  const hidden = wrong && wrong.closest("details");
  if (hidden) hidden.open = true;
  return get("controls").reportValidity();
}

async function start() {
  if (run || upload || !filledIn()) return;
  complaint.say(null);
  if (!model) return complaint.say({ code: get("model").textContent === "needs a token" ? "unauthorized" : "unreachable" });
  const wanted = chooser.kind;
  if (wanted === "file" && !chooser.file) return complaint.say(new Error("Choose a video file first."));
  if (source?.kind !== wanted || source.ended) await choose(wanted);
  if (source?.kind !== wanted || source.ended) return;
  numbers.clear();
  prompts.used();
  show("saved", false);
  show("advice", false);
  const open = {
    type: "open", prompt: prompts.value, ...size(), fps: rate(), mode: "live", format: "jpeg",
    seed: Number(get("seed").value) || 0, mask: true, queue: true,
    ...(work && { work_size: work }), ...(models.length > 1 && { model: model.model }),
  };
  stage.begin(open.width, open.height);
  stage.say("connecting");
  get("start").textContent = "Stop";
  get("start").classList.remove("primary");
  show("apply", true);
  show("whole", false);
  run = new Live(source, open, token(), {
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
  else if (message.type === "quality") {
    numbers.quality(message);
    stage.overlay.work = parsed(message.work_size);
  } else if (message.type === "dropped") numbers.drop(message.frames);
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
  await saving.stop();
  state("ready");
  numbers.quality({ level: "full" });
  get("start").classList.add("primary");
  get("apply").disabled = get("record").disabled = true;
  if (source.ended) {
    source.stop();
    source = null;
  } else stage.preview(source);
  welcome();
  const then = after;
  after = null;
  if (error) complaint.say(error);
  else if (then) then();
}

function apply() {
  if (!run || !get("prompt").reportValidity()) return;
  complaint.say(null);
  prompts.used();
  run.setPrompt(prompts.value);
}

async function whole() {
  if (run || upload || !filledIn()) return;
  complaint.say(null);
  prompts.used();
  upload = new AbortController();
  state("editing the file", "busy");
  stage.say("sending the file");
  get("start").textContent = "Stop";
  get("start").classList.remove("primary");
  show("whole", false);
  show("saved", false);
  show("advice", false);
  const { duration } = source.video;
  try {
    const edited = await editWhole(chooser.file, {
      prompt: prompts.value, seed: Number(get("seed").value) || 0, work, headers: bearer(),
      model: models.length > 1 ? model.model : "", signal: upload.signal,
      progress: (s) => stage.say(`${s.toFixed(1)} of ${duration.toFixed(1)} s are edited`),
    });
    welcome();
    stage.result(edited);
    saving.offer(edited, `${chooser.file.name.replace(/\.\w+$/, "")}-edited.mp4`, "the edited file");
  } catch (error) {
    welcome();
    if (error.name !== "AbortError") complaint.say(error);
  }
  upload = null;
  get("start").classList.add("primary");
  state("ready");
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
get("apply").addEventListener("click", apply);
get("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  if (run) apply();
  else start();
});
get("mirror").addEventListener("click", () => {
  const mirrored = !chooser.mirrored;
  get("mirror").setAttribute("aria-pressed", String(mirrored));
  if (!source) return;
  source.mirrored = mirrored;
  get("preview").classList.toggle("mirrored", mirrored);
});
get("which").addEventListener("change", () => {
  useModel(models.find(({ model: name }) => name === get("which").value));
  change({});
});
get("work").addEventListener("change", () => {
  work = get("work").value;
  change({});
});
for (const field of ["width", "height", "rate"]) {
  get(field).addEventListener("change", () => run || !source || welcome());
}
takeToken(findModel);
addEventListener("pagehide", () => run && run.stop());
findModel();
