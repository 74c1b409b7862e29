// Which video is edited: the choice above the picture, and opening what was chosen.

import { get, show } from "./dom.js";
import { Source, cameras, canShareScreen } from "./source.js";

const radio = (kind) => document.querySelector(`input[name=from][value=${kind}]`);

export class Chooser {
  // `chosen(kind)` is called for what a person chose.
  constructor(chosen) {
    this.samples = {};
    for (const input of document.querySelectorAll("input[name=from]")) {
      input.addEventListener("change", () => chosen(input.value));
    }
    radio("file").addEventListener("change", () => this.file || this.pick());
    get("file").addEventListener("change", () => chosen("file"));
    get("device").addEventListener("change", () => chosen("camera"));
    if (!canShareScreen()) radio("screen").parentElement.remove();
  }

  get kind() {
    return document.querySelector("input[name=from]:checked")?.value ?? "camera";
  }

  get file() {
    return get("file").files[0];
  }

  // The browser's own dialog, which it shows only to a person who has just clicked.
  pick() {
    if (navigator.userActivation?.isActive) get("file").click();
  }

  get mirrored() {
    return get("mirror").getAttribute("aria-pressed") === "true";
  }

  // The controls as they are for this kind; none is chosen yet for null.
  show(kind) {
    if (kind) radio(kind).checked = true;
    show("file", kind === "file");
    show("device", kind === "camera" && get("device").options.length > 1);
  }

  // The clip that the model's card names, else the first; false if none ships.
  async findSample(card) {
    this.samples = await fetch("samples/samples.json").then((answer) => answer.json());
    this.sample = card?.sample in this.samples ? card.sample : Object.keys(this.samples)[0];
    return !!this.sample;
  }

  async open(kind) {
    const video = document.createElement("video");
    video.muted = true;
    video.playsInline = true;
    if (kind === "sample") return Source.sample(`samples/${this.samples[this.sample].file}`, video);
    if (kind === "file") return Source.file(this.file, video);
    if (kind === "screen") return Source.screen(video);
    const camera = await Source.camera(get("device").value, video);
    camera.mirrored = this.mirrored;
    await this.listCameras(video.srcObject);
    return camera;
  }

  async listCameras(stream) {
    const used = stream.getVideoTracks()[0].getSettings().deviceId;
    get("device").replaceChildren(
      ...(await cameras()).map(({ label, deviceId }, n) =>
        new Option(label || `camera ${n + 1}`, deviceId, false, deviceId === used)),
    );
  }
}
