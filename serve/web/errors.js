// What went wrong, for a person.

const TEXTS = {
  unauthorized: "This server asks for a token. Enter yours under More and start again.",
  at_capacity: "All places are taken at the moment. Please try again in a little while.",
  unsupported_size: "The server cannot edit frames of this size. Choose another one under More.",
  too_slow: "This connection is too slow for the edited video. Choose a smaller size under More.",
  draining: "The server is being restarted. Please start again.",
  stopped: "The server was stopped. Start again when it runs.",
  unreachable: "The server cannot be reached. Is it running, and are you online?",
  internal: "The server had a problem. Please start again; if it stays, tell whoever runs it.",
};

export function explain(error) {
  if (error.code in TEXTS) return TEXTS[error.code];
  if (error.code) return `The server refused: ${error.message}`;
  if (error.name === "NotAllowedError") return "The browser was not allowed to use that video source.";
  if (error.name === "NotFoundError") return "No camera was found. Plug one in, or choose a file.";
  if (error.name === "NotReadableError") return "The camera is in use by another program.";
  return error.message || String(error);
}
