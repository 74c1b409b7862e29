// The live numbers in the strip under the prompt.

const WINDOW_MS = 3000;
const CHUNKS = 4; // whose median says what the model takes

// Of the wire's `quality`: what the server takes off while it is full.
const LEVELS = {
  mask: () => "fewer parts recomputed: the server is busy",
  size: ({ work_size: size }) => `smaller working size, ${size}: the server is busy`,
  steps: ({ steps }) => `fewer steps, ${steps}: the server is busy`,
};

export class Numbers {
  constructor() {
    this.clear();
  }

  clear() {
    this.shown = []; // when frames were shown
    this.took = []; // ms of the last chunks
    this.dropped = this.edited = 0;
    for (const name of ["fps", "delay", "compute", "recomputed"]) this.set(name, "-");
    for (const name of ["count", "dropped"]) this.set(name, "0");
    this.quality({ level: "full" });
    document.getElementById("numbers").classList.add("idle");
  }

  quality(message) {
    const words = message.level === "full" ? "" : LEVELS[message.level] ?? (() => "edited less well: the server is busy");
    this.set("quality", words && words(message));
  }

  set(name, text) {
    document.getElementById(name).textContent = text;
  }

  frame(delayMs) {
    const now = performance.now();
    this.edited += 1;
    document.getElementById("numbers").classList.remove("idle");
    this.shown.push(now);
    while (now - this.shown[0] > WINDOW_MS) this.shown.shift();
    const span = now - this.shown[0];
    if (span > 500) this.set("fps", ((1000 * (this.shown.length - 1)) / span).toFixed(1));
    this.set("delay", (delayMs / 1000).toFixed(delayMs < 9950 ? 2 : 0));
    this.set("count", String(this.edited));
  }

  chunk(message) {
    this.took = [...this.took, message.compute_ms].slice(-CHUNKS);
    this.set("compute", message.compute_ms.toFixed(0));
    this.set("recomputed", String(Math.round(100 * message.recomputed)));
  }

  // Seconds that a chunk takes, once enough were seen; the first also warms things up.
  get chunkSeconds() {
    if (this.took.length < CHUNKS) return null;
    return [...this.took].sort((a, b) => a - b)[CHUNKS / 2] / 1000;
  }

  drop(frames) {
    this.dropped += frames;
    this.set("dropped", String(this.dropped));
  }
}
