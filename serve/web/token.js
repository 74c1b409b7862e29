// The token of whoever uses the page; this tab remembers it.

import { get } from "./dom.js";

const KEY = "token";

// A token given in the address (better behind # than behind ?, which goes to the server) is taken
// out of it, so that it is not in the history, a bookmark or a screenshot.
export function takeToken(changed) {
  const url = new URL(location.href);
  const given = new URLSearchParams(url.hash.slice(1)).get("token") || url.searchParams.get("token");
  if (given) {
    sessionStorage.setItem(KEY, given);
    url.hash = "";
    url.searchParams.delete("token");
    history.replaceState(null, "", url);
  }
  get("token").value = sessionStorage.getItem(KEY) || "";
  get("token").addEventListener("change", () => {
    sessionStorage.setItem(KEY, token());
    changed();
  });
}

export const token = () => get("token").value;

export const bearer = () => (token() ? { Authorization: `Bearer ${token()}` } : {});
