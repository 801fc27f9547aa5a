// The console's page: asks the admin API once a second with the operator's token, shows the answer, and does what buttons say.

import { begin, show } from "./cluster.js";
import { $, make, say } from "./dom.js";

const EACH_MS = 1000, TIMEOUT_MS = 8000, MOVE_TIMEOUT_MS = 70000, SAID_MS = 9000, KEPT = "quire-admin-token";
let token = sessionStorage.getItem(KEPT) ?? "", timer = 0, answeredAt = 0, asking = false;

/** An answer of the admin API; an Error with its own words, and `status` where there was one. */
async function ask(path, body, timeout = TIMEOUT_MS) {
  const headers = { ...(token && { Authorization: `Bearer ${token}` }), ...(body && { "Content-Type": "application/json" }) };
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal: AbortSignal.timeout(timeout), cache: "no-store" });
  } catch (error) {
    throw new Error(error.name === "TimeoutError" ? `no answer within ${timeout / 1000} s` : "the admin server cannot be reached");
  }
  const said = await answer.json().catch(() => ({}));
  if (answer.ok) return said;
  throw Object.assign(new Error(said.error?.message ?? `HTTP ${answer.status}`), { status: answer.status });
}

async function look() {
  if (asking) return;
  asking = true;
  clearTimeout(timer);
  const asked = token;
  try {
    const now = await ask("/admin/console");
    if (asked !== token) return; // forgotten, or another one, meanwhile
    answeredAt = Date.now();
    open();
    show(now, { drain, migrate });
    link("live", "live");
    say($("banner"), "");
    $("banner").hidden = true;
    document.body.classList.remove("stale");
  } catch (error) {
    if (error.status === 401) return asked === token ? signIn() : undefined;
    lost(error);
  } finally {
    asking = false;
    if (!document.hidden && $("sign-in").hidden) timer = setTimeout(look, EACH_MS);
  }
}

function link(state, text) {
  $("link").dataset.state = state;
  say($("link-text"), text);
}

function lost(error) {
  const since = answeredAt ? `; what is below is ${Math.round((Date.now() - answeredAt) / 1000)} s old` : "";
  const what = error.status === 503 ? "The controller does not answer" : error.status ? "The admin API failed" : "The admin server does not answer";
  link("lost", answeredAt ? "not live" : "no answer");
  $("banner").hidden = false;
  say($("banner"), `${what} (${error.message})${since}. Trying again each second.`);
  document.body.classList.add("stale");
}

function open() {
  $("sign-in").hidden = true;
  $("console").hidden = false;
  $("sign-out").hidden = !token;
}

function signIn() {
  say($("token-error"), token ? "This token is not the server's." : "");
  token = "";
  sessionStorage.removeItem(KEPT);
  link("wait", "locked");
  $("console").hidden = $("sign-out").hidden = $("banner").hidden = true;
  document.body.classList.remove("stale");
  $("sign-in").hidden = false;
  $("token").focus();
}

/** Resolves to whether the operator means it. */
function confirmed(title, text, yes) {
  const dialog = $("confirm");
  say($("confirm-title"), title);
  say($("confirm-text"), text);
  say($("confirm-yes"), yes);
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

function tell(text, bad = false) {
  const line = make("p", bad ? { class: "bad" } : {}, text);
  $("said").append(line);
  setTimeout(() => line.remove(), SAID_MS);
}

/** Carries out what a button asks for and says what came of it. */
async function carryOut(what, work) {
  try {
    tell(...(await work()));
  } catch (error) {
    if (error.status === 401) return signIn();
    tell(`${what} failed: ${error.message}`, true);
  }
  look();
}

async function drain(id, undo) {
  const text = undo ? `${id} takes new requests again.` : `${id} takes nothing new, and its streams move to other replicas. Nothing is lost; it can be undone.`;
  if (!(await confirmed(undo ? `Let ${id} take requests again?` : `Drain ${id}?`, text, undo ? "Take requests" : "Drain"))) return;
  await carryOut(undo ? `Ending the drain of ${id}` : `Draining ${id}`, async () => {
    const now = await ask(`/admin/replicas/${encodeURIComponent(id)}/drain`, { undo });
    return [undo ? `${id} takes requests again.` : `${id} is ${now.state}: ${now.requests} requests are there.`];
  });
}

async function migrate(request, to) {
  if (!to || !(await confirmed(`Move ${request}?`, `It goes on at ${to}, with its pages. Its client notices a short pause at most.`, "Move"))) return;
  await carryOut(`Moving ${request}`, async () => {
    const row = await ask(`/admin/requests/${encodeURIComponent(request)}/migrate`, { to }, MOVE_TIMEOUT_MS);
    if (row.outcome === "moved") return [`${request} goes on at ${to}: ${row.pages} pages moved, it stood still for ${row.downtime_ms.toFixed(1)} ms.`];
    return [`${request} has not moved (${row.outcome}): ${row.reason || "no reason given"}.`, true];
  });
}

async function scale(body, title, text) {
  if (!(await confirmed(title, text, "Scale"))) return;
  await carryOut("Scaling", async () => {
    const now = await ask("/admin/scale", body);
    $("scale-to").touched = false;
    return [now.by_hand ? `${now.target} replicas are to be, until Automatic.` : "The autoscaler decides again."];
  });
}

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  if (/[^\x20-\x7e]/.test(token)) return say($("token-error"), "A token is printable ASCII.");
  sessionStorage.setItem(KEPT, token);
  $("token").value = "";
  $("sign-in").hidden = true;
  look();
});
$("sign-out").addEventListener("click", () => {
  token = "";
  signIn();
});
$("scale-to").addEventListener("input", () => ($("scale-to").touched = true));
$("scale-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const replicas = Number($("scale-to").value);
  scale({ replicas }, `Scale to ${replicas}?`, "Replicas that are too many are emptied by migration before they end. The autoscaler changes nothing until Automatic.");
});
$("scale-auto").addEventListener("click", () => scale({ auto: true }, "Let the autoscaler decide?", "The number set by hand no longer holds."));
document.addEventListener("visibilitychange", () => document.hidden || look());

begin();
look();
