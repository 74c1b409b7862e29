// The live numbers under the video.

const WINDOW_MS = 3000;

export class Numbers {
  constructor() {
    this.fields = ["fps", "delay", "compute", "recomputed", "count", "dropped"];
    this.clear();
  }

  clear() {
    this.shown = []; // when frames were shown
    this.dropped = 0;
    this.edited = 0;
    for (const name of this.fields) this.set(name, "-");
    this.set("count", "0");
    this.set("dropped", "0");
  }

  set(name, text) {
    document.getElementById(name).textContent = text;
  }

  frame(delayMs) {
    const now = performance.now();
    this.edited += 1;
    this.shown.push(now);
    while (now - this.shown[0] > WINDOW_MS) this.shown.shift();
    const span = now - this.shown[0];
    if (span > 500) this.set("fps", ((1000 * (this.shown.length - 1)) / span).toFixed(1));
    this.set("delay", delayMs < 1000 ? `${delayMs.toFixed(0)} ms` : `${(delayMs / 1000).toFixed(1)} s`);
    this.set("count", String(this.edited));
  }

  chunk(message) {
    this.set("compute", `${message.compute_ms.toFixed(0)} ms`);
    this.set("recomputed", `${Math.round(100 * message.recomputed)} %`);
  }

  drop(frames) {
    this.dropped += frames;
    this.set("dropped", String(this.dropped));
  }
}
