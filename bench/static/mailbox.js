// The mailbox page: asks the JSON API every two seconds. Mail is hostile, so it only ever becomes text nodes;
// HTML parts are shown by a sandboxed frame that loads them under a policy of its own.
"use strict";

const REFRESH_MS = 2000;
const byId = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");
const state = { messages: [], chosen: null, view: "html", whole: null, asked: 0 };

async function api(path, options) {
  const answer = await fetch("/api/v1/" + path, options);
  if (!answer.ok) {
    let detail = answer.statusText;
    try { detail = (await answer.json()).detail; } catch { /* not JSON: the status says enough */ }
    throw new Error(detail);
  }
  return answer;
}

function trouble(error) {
  const line = byId("trouble");
  line.hidden = !error;
  line.textContent = error ? "The sink does not answer: " + error.message : "";
}

function make(tag, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
}

async function refresh() {
  const query = byId("query").value.trim();
  const turn = ++state.asked;
  try {
    const [list, counters] = await Promise.all([
      api("messages?limit=200&query=" + encodeURIComponent(query)).then((a) => a.json()),
      api("counters").then((a) => a.json()),
    ]);
    if (turn !== state.asked) return; // a newer question is on its way
    trouble(null);
    byId("accepted").textContent = number.format(counters.verdicts.accepted);
    byId("deferred").textContent = number.format(counters.verdicts.deferred);
    byId("refused").textContent = number.format(counters.verdicts.refused);
    byId("duplicates").textContent = number.format(counters.duplicates);
    byId("connections").textContent = number.format(counters.connections.now);
    const same = state.messages.length === list.messages.length && state.messages.every((m, i) => m.id === list.messages[i].id);
    state.messages = list.messages;
    if (!same) drawList();
    const none = list.messages.length === 0;
    byId("none").hidden = !none;
    byId("none-title").textContent = query && list.kept ? "Nothing found" : "No mail yet";
    byId("none-text").textContent = query && list.kept
      ? "None of the " + number.format(list.kept) + " kept messages matches."
      : "What is sent to this sink appears here by itself.";
    const more = byId("more");
    more.hidden = none || list.accepted <= list.messages.length;
    more.textContent = number.format(list.messages.length) + " shown, " + number.format(list.kept) + " kept, " + number.format(list.accepted) + " accepted in all.";
  } catch (error) {
    trouble(error);
  }
}

function drawList() {
  const list = byId("list");
  list.replaceChildren(...state.messages.map((message) => {
    const item = make("li");
    item.id = "m" + message.id;
    item.dataset.id = message.id;
    item.setAttribute("role", "option");
    const when = new Date(message.at);
    item.append(
      make("span", message.to || message.recipients.join(", "), "to"),
      make("span", when.toLocaleTimeString(), "at"),
      make("span", message.subject || "(no subject)", "subject"),
      make("span", message.from || message.mail_from || "(null sender)", "from"),
    );
    item.title = when.toLocaleString();
    return item;
  }));
  mark();
}

function mark() {
  for (const item of byId("list").children) {
    const chosen = Number(item.dataset.id) === state.chosen;
    item.setAttribute("aria-selected", String(chosen));
    if (chosen) byId("list").setAttribute("aria-activedescendant", item.id);
  }
  if (!state.messages.some((m) => m.id === state.chosen)) byId("list").removeAttribute("aria-activedescendant");
}

async function choose(id) {
  state.chosen = id;
  mark();
  const item = byId("m" + id);
  if (item) item.scrollIntoView({ block: "nearest" });
  try {
    const whole = await (await api("messages/" + id)).json();
    if (state.chosen !== id) return;
    state.whole = whole;
    drawMessage();
  } catch (error) {
    state.chosen = null;
    mark();
    trouble(error);
  }
}

function drawMessage() {
  const whole = state.whole;
  byId("message").hidden = false;
  document.body.classList.add("reading");
  byId("subject").textContent = whole.subject || "(no subject)";
  const rows = [
    ["From", whole.from],
    ["To", whole.to],
    ["Envelope", (whole.envelope.mail_from || "(null sender)") + " → " + whole.envelope.recipients.join(", ")],
    ["Received", new Date(whole.at).toLocaleString() + ", " + number.format(whole.sizes.source) + " octets, " + (whole.session.tls || "no TLS") + ", from " + whole.session.client],
  ];
  if (whole.attachments.length) rows.push(["Parts", whole.attachments.map((a) => (a.name || a.type) + " (" + number.format(a.size) + ")").join(", ")]);
  byId("envelope").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", name), make("dd", value)]));
  byId("tab-html").disabled = whole.html === null;
  byId("tab-text").disabled = whole.text === null;
  let view = state.view;
  if (view === "html" && whole.html === null) view = "text";
  if (view === "text" && whole.text === null) view = whole.html === null ? "source" : "html";
  drawView(view);
}

async function drawView(view) {
  const whole = state.whole;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const chosen = tab.dataset.view === view;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
  }
  byId("view").setAttribute("aria-labelledby", "tab-" + view);
  byId("images-label").hidden = view !== "html";
  let node;
  if (view === "html") {
    node = make("iframe");
    node.title = "HTML part of the message";
    node.setAttribute("sandbox", "allow-popups allow-popups-to-escape-sandbox");
    node.setAttribute("referrerpolicy", "no-referrer");
    node.src = "/api/v1/messages/" + whole.id + "/html" + (byId("images").checked ? "?images=1" : "");
  } else if (view === "text") {
    node = make("pre", whole.text);
  } else if (view === "headers") {
    node = make("table");
    const body = make("tbody");
    for (const [name, value] of whole.headers) {
      const row = make("tr");
      const head = make("th", name);
      head.scope = "row";
      row.append(head, make("td", value));
      body.append(row);
    }
    node.append(body);
  } else {
    node = make("pre", "…");
    try {
      node.textContent = await (await api("messages/" + whole.id + "/source")).text();
    } catch (error) {
      node.textContent = error.message;
    }
    if (state.whole !== whole) return;
  }
  byId("view").replaceChildren(node);
}

function show(view) {
  if (!state.whole || byId("tab-" + view).disabled) return;
  state.view = view;
  drawView(view);
}

function move(step) {
  if (!state.messages.length) return;
  const at = state.messages.findIndex((m) => m.id === state.chosen);
  const next = at < 0 ? 0 : Math.min(state.messages.length - 1, Math.max(0, at + step));
  choose(state.messages[next].id);
}

function leave() {
  state.chosen = state.whole = null;
  byId("message").hidden = true;
  document.body.classList.remove("reading");
  mark();
  byId("list").focus();
}

byId("list").addEventListener("click", (event) => {
  const item = event.target.closest("li");
  if (item) choose(Number(item.dataset.id));
});
byId("tabs").addEventListener("click", (event) => {
  const tab = event.target.closest("[role=tab]");
  if (tab) show(tab.dataset.view);
});
byId("tabs").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const tabs = [...document.querySelectorAll("[role=tab]:not(:disabled)")];
  const next = tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length];
  next.focus();
  show(next.dataset.view);
});
byId("images").addEventListener("change", () => { if (state.whole) drawView("html"); });
byId("back").addEventListener("click", leave);
byId("search").addEventListener("submit", (event) => { event.preventDefault(); refresh(); });
byId("query").addEventListener("input", refresh);
byId("empty").addEventListener("click", async () => {
  try {
    await api("messages", { method: "DELETE" });
    leave();
    await refresh();
  } catch (error) {
    trouble(error);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input[type=search]")) {
    if (event.key === "Escape") { event.target.value = ""; event.target.blur(); refresh(); }
    return;
  }
  const steps = { j: 1, k: -1, ArrowDown: 1, ArrowUp: -1 };
  if (event.key in steps && !event.target.closest("#message")) { event.preventDefault(); move(steps[event.key]); }
  else if (event.key === "j" || event.key === "k") move(steps[event.key]);
  else if (event.key === "/") { event.preventDefault(); byId("query").focus(); }
  else if (event.key === "Escape" && state.whole) leave();
  else if (["1", "2", "3", "4"].includes(event.key)) show(["html", "text", "headers", "source"][Number(event.key) - 1]);
});
setInterval(() => { if (byId("live").checked && !document.hidden) refresh(); }, REFRESH_MS);
refresh();
