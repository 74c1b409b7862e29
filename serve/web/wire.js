// The wire protocol, version 1: one session over a WebSocket, opened again when it is lost.

import { FATES } from "./codes.js";

const RESUME_MS = 60000;
const FIRST_MS = 20000; // for a first connection that the server cut before it answered
const IN_VAIN = 5;
const MAX_BUFFERED = 1 << 20; // bytes that wait in this browser before a frame is left out

export function streamUrl() {
  const url = new URL("v1/stream", location.href);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  url.search = url.hash = "";
  return url.href;
}

// Handlers: opened(message, resumed), frame(index, timeUs, blob), message(object),
// lost(), ended(error or null).
export class Session {
  constructor(url, token, open, handlers) {
    this.url = url;
    // A browser sets no headers on a WebSocket, and an address is kept by proxies and histories.
    this.protocols = token ? ["liveedit.v1", `liveedit.token.${token}`] : ["liveedit.v1"];
    this.open = open;
    this.handlers = handlers;
    this.next = 0; // index of the next source frame
    this.received = 0; // edited frames
    this.prompt = null;
    this.over = false;
    this.ready = this.reached = false;
    this.lostAt = 0;
    this.had = this.inVain = 0; // edited frames at the last opening; openings without a new one
    this.connect();
  }

  connect() {
    this.error = null;
    const socket = (this.socket = new WebSocket(this.url, this.protocols));
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      this.reached = true;
      const resume = this.token ? { resume: this.token, received: this.received } : {};
      socket.send(JSON.stringify({ ...this.open, ...resume }));
    };
    socket.onmessage = (event) => {
      if (typeof event.data === "string") this.take(JSON.parse(event.data));
      else this.takeFrame(event.data);
    };
    socket.onclose = () => this.closed();
  }

  take(message) {
    if (message.type === "opened") {
      const resumed = this.token !== undefined;
      this.token = message.resume;
      this.next = message.next_frame;
      this.ready = true;
      this.lostAt = 0;
      this.inVain = this.received > this.had ? 0 : this.inVain + 1;
      this.had = this.received;
      if (resumed && this.prompt !== null) this.say({ type: "prompt", prompt: this.prompt });
      this.handlers.opened(message, resumed);
    } else if (message.type === "error") {
      this.error = message;
    } else if (message.type === "closed") {
      this.over = true;
      if (["stopped", "spent"].includes(message.reason)) this.error = { code: message.reason };
    }
    this.handlers.message(message);
  }

  takeFrame(buffer) {
    const view = new DataView(buffer);
    const index = view.getUint32(0, true);
    const timeUs = Number(view.getBigUint64(8, true));
    this.received += 1;
    this.handlers.frame(index, timeUs, new Blob([new Uint8Array(buffer, 16)], { type: "image/jpeg" }));
  }

  closed() {
    this.ready = false;
    const error = this.error;
    if (this.over) return this.handlers.ended(error);
    const now = performance.now();
    this.lostAt = this.lostAt || now;
    const again = this.token
      ? (!error || FATES[error.code]?.resume) && now - this.lostAt < RESUME_MS && this.inVain < IN_VAIN
      : this.reached && (!error || FATES[error.code]?.again) && now - this.lostAt < FIRST_MS;
    if (again) {
      this.handlers.lost();
      setTimeout(() => this.over || this.connect(), 300 + 700 * Math.random());
      return;
    }
    this.over = true;
    this.handlers.ended(error || { code: "unreachable" });
  }

  say(message) {
    if (this.ready) this.socket.send(JSON.stringify(message));
  }

  setPrompt(prompt) {
    this.prompt = prompt;
    this.say({ type: "prompt", prompt });
  }

  get room() {
    return this.ready && this.socket.bufferedAmount < MAX_BUFFERED;
  }

  // `image` is an ArrayBuffer; returns the frame's index.
  send(image, timeUs) {
    const message = new Uint8Array(16 + image.byteLength);
    const view = new DataView(message.buffer);
    const index = this.next++;
    view.setUint32(0, index, true);
    view.setBigUint64(8, BigInt(timeUs), true);
    message.set(new Uint8Array(image), 16);
    this.socket.send(message);
    return index;
  }

  // The rest is edited and comes back before `ended`.
  finish() {
    if (this.ready) return this.say({ type: "close" });
    this.over = true;
    this.socket.close();
  }
}
