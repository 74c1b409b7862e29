// Records what a canvas shows.

export class Recorder {
  static get supported() {
    return typeof MediaRecorder !== "undefined" && !!HTMLCanvasElement.prototype.captureStream;
  }

  constructor(canvas) {
    this.pieces = [];
    this.recorder = new MediaRecorder(canvas.captureStream());
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
