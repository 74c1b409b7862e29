// What a chunk recomputed, as a tint over the edited frames.

const TINT = "rgba(255, 196, 0, 0.35)";

export class Overlay {
  constructor() {
    this.mask = null;
  }

  // {latents, rows, columns, data: base64 of bits}; holds for the frames that follow.
  take(message) {
    const bytes = Uint8Array.from(atob(message.data), (c) => c.charCodeAt(0));
    this.mask = { ...message, bytes };
    this.frame = 0; // of the chunk, next to be drawn
  }

  // Which latent a chunk's frame belongs to: four frames each, but the first of a stream is one.
  draw(context, width, height, visible) {
    if (!this.mask) return;
    const { latents, rows, columns, bytes, index } = this.mask;
    const place = index === 0 ? Math.ceil(this.frame / 4) : Math.floor(this.frame / 4);
    const latent = Math.min(latents - 1, place);
    this.frame += 1;
    if (!visible) return;
    context.fillStyle = TINT;
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const bit = (latent * rows + row) * columns + column;
        if (bytes[bit >> 3] & (128 >> (bit & 7))) {
          context.fillRect(column * 16, row * 16, Math.min(16, width - column * 16),
            Math.min(16, height - row * 16));
        }
      }
    }
  }
}
