// Whether a machine holds a rate at a size, and what it would hold.

const ROOM = 0.85; // of the time that a chunk lasts
const LEAST = { fps: 2, side: 64 };

// `seconds` a chunk of `frames` takes at this size. Null where it is quick enough.
export function advise({ seconds, frames, fps, width, height }) {
  const lasts = frames / fps;
  if (seconds <= lasts) return null;
  const scale = Math.sqrt((ROOM * lasts) / seconds);
  const whole = (side) => Math.max(LEAST.side, 16 * Math.floor((side * scale) / 16));
  return {
    text: `This machine takes ${seconds.toFixed(1)} s for ${lasts.toFixed(2)} s of video, so frames are left out.`,
    fps: Math.max(LEAST.fps, Math.floor((ROOM * frames) / seconds)),
    width: whole(width),
    height: whole(height),
  };
}
