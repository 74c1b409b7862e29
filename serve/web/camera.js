// Where frames come from: a webcam, the screen or a file, drawn to one size at one rate.

export class Camera {
  constructor(video, stop) {
    this.video = video;
    this.release = stop;
  }

  static async open(from, file) {
    const video = document.createElement("video");
    video.muted = true;
    video.playsInline = true;
    if (from === "file") {
      if (!file) throw new Error("Choose a video file first.");
      video.src = URL.createObjectURL(file);
      video.loop = true;
      await played(video, "This browser cannot play the file.");
      return new Camera(video, () => URL.revokeObjectURL(video.src));
    }
    const devices = navigator.mediaDevices;
    if (!devices) {
      throw new Error("This browser gives pages a camera only over https, or on localhost.");
    }
    const stream = from === "screen"
      ? await devices.getDisplayMedia({ video: true })
      : await devices.getUserMedia({ video: { width: { ideal: 1280 } } });
    video.srcObject = stream;
    await played(video, "The camera gives no picture.");
    return new Camera(video, () => stream.getTracks().forEach((track) => track.stop()));
  }

  get ended() {
    const stream = this.video.srcObject;
    return stream ? stream.getTracks().every((track) => track.readyState === "ended") : false;
  }

  // Covers the canvas: scaled and cut around the centre, never stretched.
  draw(context, width, height) {
    const { videoWidth, videoHeight } = this.video;
    const scale = Math.max(width / videoWidth, height / videoHeight);
    const w = videoWidth * scale;
    const h = videoHeight * scale;
    context.drawImage(this.video, (width - w) / 2, (height - h) / 2, w, h);
  }

  stop() {
    this.video.pause();
    this.release();
  }
}

async function played(video, message) {
  try {
    await video.play();
  } catch {
    throw new Error(message);
  }
}
