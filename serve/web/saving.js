// What can be saved: an edited file, or a recording of what a canvas shows.

import { get, show } from "./dom.js";
import { Recorder } from "./recorder.js";

export class Saving {
  constructor(canvas) {
    this.canvas = canvas;
    this.recorder = null;
    get("record").addEventListener("click", () => (this.recorder ? this.stop() : this.record()));
    if (!Recorder.supported) show("record", false);
  }

  offer(blob, name, what) {
    const link = get("download");
    URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(blob);
    link.download = name;
    const { size } = blob;
    const text = size < 1e6 ? `${Math.ceil(size / 1e3)} kB` : `${(size / 1e6).toFixed(1)} MB`;
    link.textContent = `Save ${what} (${text})`;
    show("saved", true);
  }

  record() {
    this.recorder = new Recorder(this.canvas);
    this.pressed(true);
  }

  async stop() {
    if (!this.recorder) return;
    const stopping = this.recorder;
    this.recorder = null;
    this.pressed(false);
    const recording = await stopping.stop();
    const suffix = recording.type.startsWith("video/mp4") ? "mp4" : "webm";
    this.offer(recording, `liveedit.${suffix}`, "the recording");
  }

  pressed(recording) {
    get("record").textContent = recording ? "Stop recording" : "Record";
    get("record").setAttribute("aria-pressed", String(recording));
  }
}
