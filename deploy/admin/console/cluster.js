// Draws what /admin/console answers. It only reads it: what a button does is in console.js.

import { $, ago, badge, duration, fill, keyed, make, number, say, tableRow } from "./dom.js";
import { STATES, counts, draw, legend } from "./page_map.js";

const rates = { before: null, of: {} };

export function begin() {
  $("legend").append(...legend());
}

/** All of it; `actions` are what buttons do: drain(id, undo), migrate(request, to). */
export function show(now, actions) {
  speed(now);
  say($("model"), [...new Set(now.replicas.map((replica) => replica.model).filter(Boolean))].join(", "));
  tiles(now);
  replicas(now, actions);
  streams(now, actions);
  migrations(now);
  tenants(now);
  scaling(now.autoscaling);
}

/** Tokens a second since the last answer, by replica; a new life of a replica counts from nothing. */
function speed(now) {
  const at = performance.now(), before = rates.before;
  const seconds = before ? (at - before.at) / 1000 : 0;
  if (before && seconds < 0.4) return;
  rates.of = {};
  for (const replica of now.replicas) {
    const then = before?.replicas.find((other) => other.id === replica.id && other.epoch === replica.epoch);
    if (then) rates.of[replica.id] = { prompt: (replica.prompt - then.prompt) / seconds, output: (replica.output - then.output) / seconds };
  }
  rates.before = { at, replicas: now.replicas };
}

function tiles(now) {
  const running = now.requests_total - now.queue.requests, sum = (name) => Object.values(rates.of).reduce((all, rate) => all + rate[name], 0);
  const ready = now.replicas.filter((replica) => replica.state === "ready").length;
  const latency = (seen) => (seen ? [duration(seen.p50), `p90 ${duration(seen.p90)} · p99 ${duration(seen.p99)}`] : ["–", "nothing ended lately"]);
  const rows = [
    ["Replicas ready", `${ready} of ${now.autoscaling.target}`, `${now.ingresses} HTTP ${now.ingresses === 1 ? "server" : "servers"} · ${now.deaths} deaths`],
    ["Running requests", number(running), `${number(now.refused)} refused, ${number(now.expired)} expired`],
    ["Queue", number(now.queue.requests), `${number(now.queue.tokens)} prompt tokens`],
    ["Output tokens/s", number(sum("output")), `${number(sum("prompt"))} prompt tokens/s`],
    ["Time to first token, p50", ...latency(now.latency.ttft_ms)],
    ["Time per output token, p50", ...latency(now.latency.tpot_ms)],
  ];
  keyed($("tiles"), rows, (row) => row[0], ([name]) => make("div", { class: "tile" }, make("dl", {}, make("dt", {}, name), make("dd"), make("dd", { class: "small" }))), (tile, [, value, more]) => {
    const [big, small] = tile.querySelectorAll("dd");
    say(big, value);
    say(small, more);
  });
}

function replicas(now, actions) {
  keyed($("replicas"), now.replicas, (replica) => replica.id, (replica) => card(replica, actions), (element, replica) => {
    const drains = replica.state === "draining" || replica.state === "drained", rate = rates.of[replica.id];
    const [state, facts, why, device, host, button] = element.parts;
    badge(state, replica.state);
    const places = new Set(replica.ranks.map((rank) => rank.node.slice(0, 8)));
    say(facts, replica.ranks.length ? `${replica.running} running · ${replica.waiting} waiting${rate ? ` · ${number(rate.output)} tokens/s` : ""} · node ${[...places].join(", ")}` : "");
    say(why, replica.reason ? `${replica.state === "dead" ? "It died" : "It waits"}: ${replica.reason}` : "");
    why.hidden = !replica.reason;
    map(device, now.page_maps[replica.id]?.device, `Pages of ${replica.id}`);
    map(host, now.page_maps[replica.id]?.host, `Host memory of ${replica.id}`);
    say(button, drains ? "Take requests again" : "Drain");
    button.className = drains ? "quiet" : "danger";
    button.disabled = !["ready", "suspect", "draining", "drained"].includes(replica.state);
    button.undo = drains;
  });
  $("no-replicas").hidden = now.replicas.length > 0;
  say($("no-replicas"), now.autoscaling.target ? "No replica has been started yet." : "Scaled to zero: the next request starts a replica.");
}

function card(replica, actions) {
  const state = make("span"), facts = make("p", { class: "note" }), why = make("p", { class: "error" });
  const button = make("button", { type: "button" });
  button.setAttribute("aria-describedby", `name-${replica.id}`);
  button.addEventListener("click", () => actions.drain(replica.id, button.undo));
  const device = figure(), host = figure();
  const element = make("article", { class: "card", "data-replica": replica.id },
    make("div", { class: "row" }, make("h3", { id: `name-${replica.id}` }, replica.id, state), button), facts, why, device, host);
  element.parts = [state, facts, why, device, host, button];
  return element;
}

function figure() {
  return make("figure", {}, make("canvas", { role: "img" }), make("figcaption"));
}

function map(element, tier, title) {
  element.hidden = !tier?.pages;
  if (element.hidden) return;
  const [canvas, caption] = element.children, found = counts(tier.cells);
  const each = Math.ceil(tier.pages / tier.cells.length), unit = each > 1 ? `cells of ${each} pages` : "pages";
  const words = Object.entries(STATES).filter(([state]) => found[state]).map(([state, name]) => `${number(found[state])} ${name}`).join(", ");
  say(caption, `${title.startsWith("Host") ? "Host memory: " : ""}${words} of ${number(tier.cells.length)} ${unit}`);
  canvas.setAttribute("aria-label", `${title}: ${words}`);
  canvas.dataset.cells = tier.cells;
  draw(canvas, tier.cells);
}

function streams(now, actions) {
  const ready = now.replicas.filter((replica) => replica.state === "ready").map((replica) => replica.id);
  const moving = new Map(now.moving.map((move) => [move.request, move.destination]));
  keyed($("requests"), now.requests, (request) => request.id, (request) => stream(request, actions), (row, request) => {
    const on = moving.get(request.id);
    fill(row, [request.id, request.replica ?? "–", request.tenant || "–", undefined, number(request.prompt_tokens), number(request.output_tokens)]);
    badge(row.cells[3].firstChild ?? row.cells[3].appendChild(make("span")), on ? "moving" : request.state);
    const others = ready.filter((id) => id !== request.replica);
    keyed(row.to, others, (id) => id, (id) => make("option", { value: id }, id), () => {});
    row.to.disabled = row.go.disabled = !request.replica || !others.length || Boolean(on);
  });
  $("no-requests").hidden = now.requests.length > 0;
  say($("requests-note"), now.requests_total > now.requests.length ? `${now.requests.length} of ${number(now.requests_total)} are shown` : "");
}

function stream(request, actions) {
  const row = tableRow(7, { 0: "id", 4: "n", 5: "n" });
  row.dataset.request = request.id;
  row.to = make("select", { "aria-label": `Where ${request.id} is to move` });
  row.go = make("button", { type: "button", class: "quiet", "aria-label": `Move ${request.id}` }, "Move");
  row.go.addEventListener("click", () => actions.migrate(request.id, row.to.value));
  row.cells[6].append(make("div", { class: "row" }, row.to, row.go));
  return row;
}

function migrations(now) {
  const under = now.moving.map((move) => ({ ...move, key: `now ${move.request}`, outcome: "moving" }));
  const over = now.moved.map((move, i) => ({ ...move, key: `${now.moved.length - i}` }));
  keyed($("moves"), [...under, ...over], (move) => move.key, () => tableRow(7, { 0: "id", 2: "why", 4: "n", 5: "n", 6: "n" }), (row, move) => {
    const still = move.outcome === "moved" ? duration(move.downtime_ms) : "–", when = move.ago_s === undefined ? "now" : ago(move.ago_s);
    const why = move.reason ? `${move.cause}: ${move.reason}` : move.cause;
    fill(row, [move.request, `${move.source} → ${move.destination}`, why, undefined, number(move.pages), still, when]);
    badge(row.cells[3].firstChild ?? row.cells[3].appendChild(make("span")), move.outcome);
  });
  $("no-moves").hidden = under.length + over.length > 0;
  say($("moves-note"), under.length ? `${under.length} under way` : "");
}

function tenants(now) {
  keyed($("tenants"), now.tenants, (tenant) => tenant.name, () => tableRow(7, { 1: "n", 2: "n", 3: "n", 4: "n", 5: "n", 6: "why" }), (row, tenant) => {
    const limits = Object.entries(tenant.bounds).map(([name, value]) => `${name} ${number(value)}`).join(", ") || "none";
    fill(row, [tenant.name || "(no name)", number(tenant.waiting), number(tenant.running), number(tenant.pages), `${tenant.weight}`, number(tenant.served), limits]);
  });
  $("no-tenants").hidden = now.tenants.length > 0;
  const cut = now.tenants_total > now.tenants.length ? ` · ${now.tenants.length} of ${number(now.tenants_total)} are shown` : "";
  say($("tenants-note"), `${number(now.queue.requests)} in the queue${cut}`);
}

function scaling(scale) {
  const most = scale.limits?.max, input = $("scale-to");
  say($("scale-note"), `${scale.ready} ready, ${scale.target} to be · ${scale.by_hand ? "set by hand" : scale.autoscaler ? `policy ${scale.autoscaler}` : "no autoscaler"}`);
  if (scale.limits) [input.min, input.max] = [scale.limits.min, most];
  if (document.activeElement !== input && !input.touched) input.value = scale.target;
  $("scale-auto").disabled = !scale.autoscaler || !scale.by_hand;
  $("scale-auto").title = scale.autoscaler ? "" : "There is no autoscaler (--autoscaler)";
  const leaving = Object.entries(scale.leaving ?? {}).map(([id, moved]) => `${id} is being emptied to go, ${moved} requests have moved`);
  say($("scale-why"), [...leaving, scale.stays_because].filter(Boolean).join("; "));
  keyed($("scalings"), scale.decisions, (decision) => `${decision.unix_s} ${decision.why}`, () => tableRow(5, { 1: "n", 2: "n", 3: "why" }), (row, decision) => {
    const when = new Date(decision.unix_s * 1000).toLocaleTimeString("en-GB"), why = decision.detail ? `${decision.why}: ${decision.detail}` : decision.why;
    fill(row, [when, `${decision.before} → ${decision.target}`, `${decision.wanted}`, why, decision.policy || "by hand"]);
  });
  $("no-scalings").hidden = scale.decisions.length > 0;
}
