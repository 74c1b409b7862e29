// Whether a machine holds a rate at a working size, and what it would hold.

import { ROOM } from "./sizes.js";

const LEAST = { fps: 2, side: 64 };

// `seconds` a chunk of `frames` takes, edited at {width, height}. Null where it is quick enough;
// `work` is null where no smaller size is worth it.
export function advise({ seconds, frames, fps, width, height }) {
  const lasts = frames / fps;
  if (seconds <= lasts) return null;
  const scale = Math.sqrt((ROOM * lasts) / seconds);
  const whole = (side) => Math.max(LEAST.side, 16 * Math.floor((side * scale) / 16));
  const smaller = { width: whole(width), height: whole(height) };
  return {
    text: `This machine takes ${seconds.toFixed(1)} s for ${lasts.toFixed(2)} s of video, so frames are left out.`,
    fps: Math.max(LEAST.fps, Math.floor((ROOM * frames) / seconds)),
    work: smaller.width * smaller.height < width * height ? `${smaller.width}x${smaller.height}` : null,
  };
}
