// Records what a canvas shows.

// The first that the browser has. Chromium by itself takes VP8, whose frames do not say that their
// values are of the full range: players show them too dark.
const TYPES = ["video/mp4;codecs=avc1", "video/mp4", "video/webm;codecs=vp9", ""];

export class Recorder {
  static get supported() {
    return typeof MediaRecorder !== "undefined" && !!HTMLCanvasElement.prototype.captureStream;
  }

  constructor(canvas) {
    this.pieces = [];
    const mimeType = TYPES.find((type) => MediaRecorder.isTypeSupported(type));
    this.recorder = new MediaRecorder(canvas.captureStream(), { mimeType });
    this.recorder.ondataavailable = (event) => this.pieces.push(event.data);
    this.recorder.start(1000);
  }

  // The whole recording, as a Blob.
  stop() {
    return new Promise((resolve) => {
      this.recorder.onstop = () => resolve(new Blob(this.pieces, { type: this.recorder.mimeType }));
      this.recorder.stop();
    });
  }
}
