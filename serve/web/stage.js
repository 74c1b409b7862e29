// The stage: the edit large, the source beside it, and what can be done with the picture.

import { Overlay } from "./overlay.js";

const get = (id) => document.getElementById(id);

export class Stage {
  constructor() {
    this.root = get("stage");
    this.edited = get("edited");
    this.source = get("source");
    this.overlay = new Overlay(get("tint"));
    get("divider").addEventListener("input", () => {
      this.root.style.setProperty("--divider", `${get("divider").value}%`);
    });
    for (const input of document.querySelectorAll("input[name=view]")) {
      input.addEventListener("change", () => (this.root.dataset.view = input.value));
    }
    get("fullscreen").addEventListener("click", () => {
      if (document.fullscreenElement) document.exitFullscreen();
      else get("theatre").requestFullscreen();
    });
    get("snapshot").addEventListener("click", () => this.snapshot());
  }

  // "preview": the source alone; "edit": what is edited; "result": a file that was.
  show(what) {
    this.root.dataset.showing = what;
    get("snapshot").disabled = what !== "edit";
    get("result").classList.toggle("hidden", what !== "result");
    if (what !== "result") get("result").pause();
  }

  preview(source) {
    const { video } = source;
    video.setAttribute("aria-label", "Preview of the source");
    get("preview").replaceChildren(video);
    get("preview").classList.toggle("mirrored", source.mirrored);
    this.ratio(video.videoWidth, video.videoHeight);
    this.show("preview");
  }

  ratio(width, height) {
    this.root.style.setProperty("--ratio", String(width / height));
  }

  // Frames of this size follow.
  begin(width, height) {
    for (const canvas of [this.edited, this.source, this.overlay.canvas]) {
      Object.assign(canvas, { width, height });
    }
    this.overlay.mask = null;
    this.ratio(width, height);
  }

  draw(edited, source, tint) {
    this.edited.getContext("2d").drawImage(edited, 0, 0);
    if (source) this.source.getContext("2d").drawImage(source, 0, 0);
    const tinted = Math.round(100 * this.overlay.draw(tint));
    const rest = tinted < 100 ? "; the first and last steps compute all of it" : "";
    get("tinted").textContent = tint ? `(${tinted} % of the picture${rest})` : "";
    if (this.root.dataset.showing !== "edit") this.show("edit");
  }

  // A finished file, or what became of it.
  result(blob) {
    const video = get("result");
    URL.revokeObjectURL(video.src);
    video.src = URL.createObjectURL(blob);
    video.onloadedmetadata = () => this.ratio(video.videoWidth, video.videoHeight);
    this.show("result");
  }

  // Words over the picture; null shows the buttons that start something.
  say(text) {
    get("welcome").dataset.busy = text === null ? "" : "yes";
    get("note").textContent = text ?? "";
  }

  snapshot() {
    this.edited.toBlob((blob) => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(blob);
      link.download = "liveedit.png";
      link.click();
      URL.revokeObjectURL(link.href);
    });
  }
}
