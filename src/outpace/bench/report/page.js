"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const stored = () => { try { return localStorage.getItem("outpace-theme"); } catch { return null; } };
  const asked = new URLSearchParams(location.hash.slice(1)).get("theme");
  const preferred = matchMedia("(prefers-color-scheme: dark)");

  // Colours of figures are names; their values belong to the theme.
  const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name.slice(1)).trim();
  const resolve = (value) => {
    if (typeof value === "string") return /^@[a-z0-9]+$/.test(value) ? colour(value) : value;
    if (Array.isArray(value)) return value.map(resolve);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item)]));
    }
    return value;
  };

  function draw(plot) {
    const figure = resolve(data.figures[plot.dataset.cell][plot.dataset.figure]);
    const narrow = plot.clientWidth < 480;
    const axis = { gridcolor: colour("@grid"), linecolor: colour("@line"), zerolinecolor: colour("@line"), automargin: true, fixedrange: narrow };
    const layout = {
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 12, color: colour("@text") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: narrow ? 40 : 56, r: 16, t: 16, b: 44 },
      showlegend: false,
      hoverlabel: { bgcolor: colour("@card"), bordercolor: colour("@line"), font: { color: colour("@text"), size: 12 } },
      ...figure.layout,
      legend: { orientation: "h", x: 0, xanchor: "left", y: -0.16, yanchor: "top", font: { size: narrow ? 10.5 : 11.5 }, ...figure.layout.legend },
      xaxis: { ...axis, ...figure.layout.xaxis }, yaxis: { ...axis, ...figure.layout.yaxis },
    };
    layout.legend.y = -58 / (layout.height - 60);
    if (layout.showlegend) layout.margin.b = 84;
    Plotly.react(plot, figure.data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }
  const drawShown = () => document.querySelectorAll(".cell:not([hidden]) .plot").forEach(draw);

  function paint(theme) {
    root.dataset.theme = theme;
    drawShown();
  }
  paint(asked || stored() || (preferred.matches ? "dark" : "light"));
  preferred.addEventListener("change", (event) => { if (!stored()) paint(event.matches ? "dark" : "light"); });
  document.getElementById("theme").addEventListener("click", () => {
    const theme = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("outpace-theme", theme); } catch { /* a file may not be allowed to remember */ }
    paint(theme);
  });

  // Tabs
  const tabs = [...document.querySelectorAll("[role=tab]")];
  function choose(tab) {
    tabs.forEach((other) => {
      other.setAttribute("aria-selected", String(other === tab));
      other.tabIndex = other === tab ? 0 : -1;
      document.getElementById(other.getAttribute("aria-controls")).hidden = other !== tab;
    });
    drawShown();
  }
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) { const next = tabs[(index + step + tabs.length) % tabs.length]; choose(next); next.focus(); }
    });
  });

  // Tables sort by a click on a heading, and back to their own order by the third.
  document.querySelectorAll("table.sortable").forEach((table) => {
    const body = table.tBodies[0];
    const original = [...body.rows];
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      if (!head.textContent) return;
      head.tabIndex = 0;
      const sort = () => {
        const next = { none: "descending", descending: "ascending", ascending: "none" }[head.getAttribute("aria-sort") || "none"];
        [...table.tHead.rows[0].cells].forEach((other) => other.removeAttribute("aria-sort"));
        if (next !== "none") head.setAttribute("aria-sort", next);
        const value = (row) => { const cell = row.cells[column]; return cell.dataset.sort !== undefined ? Number(cell.dataset.sort) : cell.textContent; };
        const sign = next === "ascending" ? 1 : -1;
        const order = (a, b) => { const [x, y] = [value(a), value(b)]; return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y))); };
        (next === "none" ? original : [...original].sort(order)).forEach((row) => body.append(row));
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); } });
    });
  });

  // Replay
  const section = document.getElementById("replay");
  if (!section) return;
  const get = (id) => document.getElementById(id);
  const question = get("replay-question"), method = get("replay-method"), text = get("replay-text"), note = get("replay-round");
  let playing = null;

  const piece = (tag, content, kind) => {
    const found = document.createElement(tag);
    found.textContent = content;
    if (kind) found.className = kind;
    return found;
  };
  const answer = () => data.replays[question.value].answers.find((one) => one.method === method.value);

  function explain(round, index) {
    note.replaceChildren(piece("b", `Round ${index + 1}`));
    if (!round.nodes) { note.append(": nothing was drafted; the target said ", piece("mark", round.own || "(end)"), "."); return; }
    note.append(`: ${round.nodes} draft tokens, ${round.accepted_tokens} accepted. `);
    round.drafted.forEach((path, i) => {
      note.append(i ? " · " : "Draft: ");
      let same = 0;
      while (same < path.length && same < round.accepted.length && path[same] === round.accepted[same]) same += 1;
      if (same) note.append(piece("mark", path.slice(0, same)));
      if (same < path.length) note.append(piece("s", path.slice(same)));
    });
    note.append(" The target went on with ", piece("mark", round.own || "(end)"), ".");
  }

  function show() {
    stop();
    get("replay-prompt").textContent = data.replays[question.value].prompt;
    const found = answer();
    text.replaceChildren(...found.rounds.map((round, index) => {
      const span = document.createElement("span");
      span.className = "round";
      span.tabIndex = 0;
      if (round.accepted) span.append(piece("span", round.accepted, "ok"));
      if (round.own) span.append(piece("span", round.own, "own"));
      const tell = () => {
        text.querySelectorAll(".on").forEach((other) => other.classList.remove("on"));
        span.classList.add("on");
        explain(round, index);
      };
      span.addEventListener("pointerenter", tell);
      span.addEventListener("focus", tell);
      span.addEventListener("click", tell);
      return span;
    }));
    const emitted = found.tokens.length;
    note.textContent = `${emitted} tokens in ${found.rounds.length} rounds: ${(emitted / found.rounds.length).toFixed(2)} per round.`;
  }

  function stop() {
    if (playing) cancelAnimationFrame(playing);
    playing = null;
    get("replay-play").textContent = "Play at measured speed";
    text.querySelectorAll(".later").forEach((span) => span.classList.remove("later"));
  }

  function play() {
    if (playing) { stop(); return; }
    const found = answer();
    const drafted = data.pace[found.method], plain = data.pace[data.base];
    if (!drafted || !plain) return;
    const spans = [...text.children];
    spans.forEach((span) => span.classList.add("later"));
    get("replay-race").hidden = false;
    get("race-name").textContent = found.method;
    get("replay-play").textContent = "Stop";
    const total = found.tokens.length;
    const started = performance.now();
    let shown = 0, emitted = 0;
    const counts = found.rounds.map((round) => round.accepted_tokens + 1);
    const frame = () => {
      const elapsed = performance.now() - started;
      while (shown < spans.length && (shown + 1) * drafted <= elapsed) {
        spans[shown].classList.remove("later");
        emitted = Math.min(total, emitted + counts[shown]);
        shown += 1;
      }
      const slow = Math.min(total, Math.floor(elapsed / plain));
      get("race-drafted").style.width = `${(100 * (shown === spans.length ? total : emitted)) / total}%`;
      get("race-plain").style.width = `${(100 * slow) / total}%`;
      if (shown < spans.length || slow < total) playing = requestAnimationFrame(frame);
      else stop();
    };
    playing = requestAnimationFrame(frame);
  }

  function fill() {
    const chosen = method.value;
    method.replaceChildren(...data.replays[question.value].answers.map((one) => new Option(one.method, one.method)));
    if ([...method.options].some((option) => option.value === chosen)) method.value = chosen;
    show();
  }
  question.addEventListener("change", fill);
  method.addEventListener("change", show);
  get("replay-play").addEventListener("click", play);
  fill();
})();
