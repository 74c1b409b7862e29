// What a chunk recomputed, as a tint on a canvas of its own: recordings and snapshots have none.

const TINT = "rgba(255, 196, 0, 0.35)";

export class Overlay {
  constructor(canvas) {
    this.canvas = canvas;
    this.mask = null;
    this.work = null; // the size that the model sees, whose squares of 16 pixels a mask has
  }

  // {latents, rows, columns, data: base64 of bits}; holds for the frames that follow.
  take(message) {
    const bytes = Uint8Array.from(atob(message.data), (c) => c.charCodeAt(0));
    this.mask = { ...message, bytes };
    this.frame = 0; // of the chunk, next to be drawn
  }

  // Which latent a chunk's frame belongs to: four frames each, but the first of a stream is one.
  // Returns the share of the picture that is tinted.
  draw(visible) {
    const { width, height } = this.canvas;
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (!this.mask) return 0;
    const { latents, rows, columns, bytes, index } = this.mask;
    const place = index === 0 ? Math.ceil(this.frame / 4) : Math.floor(this.frame / 4);
    const latent = Math.min(latents - 1, place);
    this.frame += 1;
    if (!visible) return 0;
    const [x, y] = [(16 * width) / this.work.width, (16 * height) / this.work.height];
    let tinted = 0;
    context.fillStyle = TINT;
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const bit = (latent * rows + row) * columns + column;
        if (!(bytes[bit >> 3] & (128 >> (bit & 7)))) continue;
        context.fillRect(column * x, row * y, x, y);
        tinted += 1;
      }
    }
    return tinted / (rows * columns);
  }
}
