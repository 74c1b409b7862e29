// What went wrong, for a person.

import { FATES } from "./codes.js";

// By the code of the server's `error` message, or of wire.js.
export const CODES = {
  unauthorized: "This server asks for a token. Enter yours under Settings and start again.",
  at_capacity: "All places are taken at the moment.",
  unsupported_size: "The server cannot edit frames of this size. Choose another one under Settings.",
  too_slow: "Connection or server are too slow for this. Choose a smaller size under Settings, or come back later.",
  draining: "The server is being restarted. Please start again.",
  stopped: "The server was stopped. Start again when it runs.",
  spent: "The minutes of your token are used up for today.",
  unreachable: "The server cannot be reached. Is it running, and are you online?",
  internal: "The server had a problem. Please start again; if it stays, tell whoever runs it.",
};

// By the name of a DOMException. Its `code` is a number of old (NotFoundError has 8), not ours.
export const NAMES = {
  NotAllowedError: "The browser was not allowed to use that video source. Allow it beside the address.",
  NotFoundError: "No camera was found. Plug one in, or choose the sample or a file.",
  NotReadableError: "The camera is in use by another program. Close that one, or choose another camera.",
  OverconstrainedError: "The chosen camera is gone. Choose another one.",
};

const ENDED = new Set(["stopped", "unreachable"]); // wire.js says these, no server

export function explain(error) {
  if (error.name in NAMES) return NAMES[error.name];
  if (error.code in CODES) return CODES[error.code];
  if (typeof error.code === "string") return `The server refused: ${error.message}`;
  return error.message || String(error);
}

export const worthAnotherTry = (error) => ENDED.has(error.code) || !!FATES[error.code]?.resume;
