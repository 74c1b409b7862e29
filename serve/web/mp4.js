// How many seconds of video a fragmented MP4 holds so far (ISO/IEC 14496-12).

const INSIDE = new Set(["moov", "trak", "mdia", "moof", "traf"]);

export class Mp4Clock {
  constructor() {
    this.seconds = 0;
    this.scale = 0; // units a second of the first track, which is the picture
    this.skip = 0; // bytes of a box that does not matter
    this.rest = new Uint8Array(0);
  }

  // The next bytes, however they were cut. Returns where the newest fragment begins.
  push(bytes) {
    const joined = new Uint8Array(this.rest.length + bytes.length);
    joined.set(this.rest);
    joined.set(bytes, this.rest.length);
    let at = Math.min(this.skip, joined.length);
    this.skip -= at;
    while (at + 8 <= joined.length) {
      const { size, type } = header(joined, at);
      if (INSIDE.has(type)) {
        if (at + size > joined.length) break; // comes whole before it is looked at
        this.look(joined, at + 8, at + size);
      }
      if (size < 8) throw new Error("the answer is no MP4");
      this.skip = Math.max(0, at + size - joined.length);
      at = Math.min(at + size, joined.length);
    }
    this.rest = joined.slice(at);
    return this.seconds;
  }

  look(bytes, from, to) {
    const view = new DataView(bytes.buffer, bytes.byteOffset);
    for (let at = from; at + 8 <= to; ) {
      const { size, type } = header(bytes, at);
      const long = bytes[at + 8] === 1; // version 1 has 64 bits a time
      if (INSIDE.has(type)) {
        this.look(bytes, at + 8, at + size);
      } else if (type === "mdhd") {
        this.scale = this.scale || view.getUint32(at + (long ? 28 : 20));
      } else if (type === "tfhd") {
        this.track = view.getUint32(at + 12);
        this.first = this.first ?? this.track;
      } else if (type === "tfdt" && this.track === this.first) {
        const time = long ? Number(view.getBigUint64(at + 12)) : view.getUint32(at + 12);
        this.seconds = time / this.scale;
      }
      at += Math.max(8, size);
    }
  }
}

function header(bytes, at) {
  const view = new DataView(bytes.buffer, bytes.byteOffset + at);
  return { size: view.getUint32(0), type: String.fromCharCode(...bytes.subarray(at + 4, at + 8)) };
}
