// One live session: frames of a source go out at its rate, edits come back and are shown.

import { Session, streamUrl } from "./wire.js";

const KEPT = 240; // source frames that wait for their edit
const QUALITY = 0.9; // of the JPEGs that are sent

export class Live {
  // `open` is the wire's first message. `on` hears state(text, kind), edited(delayMs, picture,
  // source), message(object) and ended(error or null).
  constructor(source, open, token, on) {
    Object.assign(this, { source, open, on });
    const { width, height } = open;
    this.picture = new OffscreenCanvas(width, height);
    this.context = this.picture.getContext("2d");
    this.sources = new Map();
    this.showing = Promise.resolve(); // pictures are decoded and drawn in order
    this.stopping = false;
    on.state("connecting", "busy");
    this.session = new Session(streamUrl(), token, open, this);
  }

  // From here to `ended`: what the session tells.
  opened() {
    this.on.state("live", "live");
    this.forget(Infinity);
    if (!this.timer) this.film();
  }

  frame(index, timeUs, image) {
    this.showing = this.showing.then(() => this.show(index, timeUs, image));
  }

  message(message) {
    if (["mask", "quality"].includes(message.type)) this.showing = this.showing.then(() => this.on.message(message));
    else this.on.message(message);
  }

  lost() {
    this.on.state("connection lost, reconnecting", "busy");
  }

  ended(error) {
    clearInterval(this.timer);
    this.showing.catch((failed) => failed).then((failed) => {
      this.forget(Infinity);
      this.on.ended(error ?? failed ?? null);
    });
  }

  // Sends frames at the session's rate; a frame that the network cannot take is left out.
  film() {
    const { width, height, fps } = this.open;
    const began = performance.now();
    let tick = 0;
    let busy = false;
    this.timer = setInterval(async () => {
      if (this.source.ended) return this.stop();
      const due = Math.floor(((performance.now() - began) * fps) / 1000);
      if (due < tick || busy || !this.session.room || this.stopping) return;
      tick = due + 1;
      busy = true;
      try {
        this.source.draw(this.context, width, height);
        const timeUs = Math.round(performance.now() * 1000);
        const source = await createImageBitmap(this.picture);
        const blob = await this.picture.convertToBlob({ type: "image/jpeg", quality: QUALITY });
        const image = await blob.arrayBuffer();
        if (!this.session.room || this.stopping) return source.close();
        this.sources.set(this.session.send(image, timeUs), source);
        this.forget(this.session.next - KEPT);
      } finally {
        busy = false;
      }
    }, 1000 / fps / 3);
  }

  forget(before) {
    for (const [index, picture] of this.sources) {
      if (index >= before) return;
      picture.close();
      this.sources.delete(index);
    }
  }

  async show(index, timeUs, image) {
    const picture = await createImageBitmap(image);
    this.on.edited(performance.now() - timeUs / 1000, picture, this.sources.get(index));
    picture.close();
    this.forget(index + 1);
  }

  setPrompt(prompt) {
    this.on.state("changing the instruction", "busy");
    this.session.setPrompt(prompt);
  }

  // What was sent is edited and comes back before `ended`.
  stop() {
    if (this.stopping) return;
    this.stopping = true;
    clearInterval(this.timer);
    this.on.state("finishing", "busy");
    this.session.finish();
  }
}
