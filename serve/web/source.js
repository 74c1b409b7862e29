// Where frames come from: a shipped clip, a camera, the screen or a file. A source plays from the
// moment it is chosen, so that it can be looked at before anything is sent.

export class Source {
  // `still` sources loop and belong to this page, others are a device's.
  constructor(kind, video, release) {
    this.kind = kind;
    this.video = video;
    this.release = release;
    this.mirrored = false;
  }

  static async sample(url, video) {
    video.src = url;
    video.loop = true;
    await played(video, "The sample clip cannot be played. Choose a camera or a file.");
    return new Source("sample", video, () => {});
  }

  static async file(file, video) {
    const url = (video.src = URL.createObjectURL(file));
    video.loop = true;
    await played(video, "This browser cannot play the file; `liveedit edit` reads any codec.");
    return new Source("file", video, () => URL.revokeObjectURL(url));
  }

  static async camera(deviceId, video) {
    const wanted = { width: { ideal: 1280 }, ...(deviceId && { deviceId: { exact: deviceId } }) };
    const stream = await devices().getUserMedia({ video: wanted });
    return Source.device("camera", stream, video, "The camera gives no picture.");
  }

  static async screen(video) {
    const stream = await devices().getDisplayMedia({ video: true });
    return Source.device("screen", stream, video, "The screen gives no picture.");
  }

  static async device(kind, stream, video, message) {
    const stop = () => stream.getTracks().forEach((track) => track.stop());
    video.srcObject = stream;
    try {
      await played(video, message);
    } catch (error) {
      stop();
      throw error;
    }
    return new Source(kind, video, stop);
  }

  get ended() {
    const stream = this.video.srcObject;
    return stream ? stream.getTracks().every((track) => track.readyState === "ended") : false;
  }

  get size() {
    return { width: this.video.videoWidth, height: this.video.videoHeight };
  }

  // Covers the canvas: scaled and cut around the centre, never stretched.
  draw(context, width, height) {
    const { videoWidth, videoHeight } = this.video;
    const scale = Math.max(width / videoWidth, height / videoHeight);
    const [w, h] = [videoWidth * scale, videoHeight * scale];
    context.setTransform(this.mirrored ? -1 : 1, 0, 0, 1, this.mirrored ? width : 0, 0);
    context.drawImage(this.video, (width - w) / 2, (height - h) / 2, w, h);
  }

  stop() {
    this.video.pause();
    this.release();
  }
}

export async function cameras() {
  const found = await devices().enumerateDevices();
  return found.filter((device) => device.kind === "videoinput");
}

export const canShareScreen = () => !!navigator.mediaDevices?.getDisplayMedia;

function devices() {
  if (navigator.mediaDevices) return navigator.mediaDevices;
  throw new Error(
    "This browser gives pages a camera only over https, or on localhost: " +
      "start the server with --https, or choose the sample or a file.",
  );
}

async function played(video, message) {
  try {
    await video.play();
  } catch {
    throw new Error(message);
  }
}
