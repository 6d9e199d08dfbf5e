// Markdown as models write it, made into elements. What is not understood stays text, so hostile
// text is text: only `make` creates elements, and only http(s) links get an address.
//
// A block is {source, build}: the text that it came from and what makes its element. Single line
// breaks are kept (by the style sheet), because models mean them. The work grows with the text's
// length and no faster, whatever the text: nesting is bounded, and no pattern looks ahead far.

import { make, makeCopyButton } from "./dom.js";

const MAX_DEPTH = 8;
const MAX_INLINE_DEPTH = 12;
const MAX_LINK_CHARS = 2000;
const MAX_ROW_CHARS = 4000;

const FENCE = /^( *)(?:(`{3,})([^`]*)|(~{3,})(.*))$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const FIRST_ITEM = /^ {0,3}([-*+]|1[.)]) +\S/;
const TABLE_RULE = /^\|?(?: *:?-+:? *\|)*(?: *:?-+:?)?$/;

// Make `container` show `text`. Of what it showed before (by this function), only what has changed
// is replaced: an answer that grows keeps its selections and does not flicker.
export function updateMarkdown(container, text) {
  const blocks = parseBlocks(text.split(/\r\n|\n|\r/), 0);
  const shown = container.shownBlocks ?? [];
  let n = 0;
  while (n < shown.length && n < blocks.length && shown[n] === blocks[n].source) n++;
  while (container.childNodes.length > n) container.lastChild.remove();
  for (const block of blocks.slice(n)) container.append(block.build());
  container.shownBlocks = blocks.map((block) => block.source);
}

// ---- blocks

function parseBlocks(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (lines[at].trim() === "") {
      at++;
      continue;
    }
    const [end, build] = readBlock(lines, at, depth);
    blocks.push({ source: lines.slice(at, end).join("\n"), build });
    at = end;
  }
  return blocks;
}

// Where the block that begins at line `at` ends, and what builds it.
function readBlock(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return readFence(lines, at);
  const heading = HEADING.exec(line);
  if (heading) {
    // The page has the levels 1 and 2 itself.
    const tag = `h${Math.min(heading[1].length + 2, 6)}`;
    return [at + 1, () => make(tag, {}, ...inline(heading[2].trim().replace(/ #+$/, "")))];
  }
  if (RULE.test(line)) return [at + 1, () => make("hr")];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return readQuote(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return readList(lines, at, depth);
  if (isTable(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at, depth);
}

function readParagraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && !interrupts(lines, end, depth)) end++;
  const text = lines.slice(at, end).join("\n").trim();
  return [end, () => make("p", {}, ...inline(text))];
}

// Whether a block begins at the line although the one before is a paragraph's.
function interrupts(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || isTable(lines, at)) return true;
  return depth < MAX_DEPTH && (QUOTE.test(line) || FIRST_ITEM.test(line));
}

function readFence(lines, at) {
  const [, indent, ticks, tickInfo, tildes, tildeInfo] = FENCE.exec(lines[at]);
  const [fence, info] = [ticks ?? tildes, tickInfo ?? tildeInfo];
  const isClose = (line) => {
    const text = line.trim();
    return text.length >= fence.length && text === fence[0].repeat(text.length);
  };
  let end = at + 1;
  while (end < lines.length && !isClose(lines[end])) end++;
  const text = lines.slice(at + 1, end).map((line) => unindent(line, indent.length)).join("\n");
  const language = info.trim().split(/\s/)[0].slice(0, 40);
  return [Math.min(end + 1, lines.length), () => makeCode(text, language)];
}

function makeCode(text, language) {
  return make("div", { class: "code" },
    make("div", { class: "code-bar" },
      make("span", {}, language || "code"), makeCopyButton("Copy code", () => text)),
    make("pre", {}, make("code", {}, text)));
}

function readQuote(lines, at, depth) {
  let end = at;
  const inner = [];
  while (end < lines.length && QUOTE.test(lines[end])) {
    inner.push(lines[end++].replace(QUOTE, ""));
  }
  return [end, () => make("blockquote", {}, ...build(inner, depth + 1))];
}

function readList(lines, at, depth) {
  const [, indent, marker] = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(marker);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const next = firstFilled(lines, end);
    const found = ITEM.exec(lines[next] ?? "");
    if (found && found[1].length < indent.length + 2 && !RULE.test(lines[next])) {
      if (/\d/.test(found[2]) !== isOrdered) break;
      items.push([lines[next].slice(found[0].length)]);
    } else if (next < lines.length && belongs(lines, next, next > end, indent.length, depth)) {
      const line = unindent(lines[next], indent.length + marker.length + 1);
      items.at(-1).push(...(next > end ? ["", line] : [line]));
    } else {
      break;
    }
    end = next + 1;
  }
  const start = isOrdered ? Number.parseInt(marker, 10) : 1;
  const attributes = isOrdered && start !== 1 ? { start } : {};
  return [end, () => make(isOrdered ? "ol" : "ul", attributes,
    ...items.map((item) => make("li", {}, ...build(item, depth + 1))))];
}

// Whether the line goes on with the list's last item: it is indented, or the paragraph goes on.
function belongs(lines, at, isAfterGap, indent, depth) {
  if (indentOf(lines[at]) >= indent + 2) return true;
  return !isAfterGap && !interrupts(lines, at, depth);
}

// The next line from `at` on that is not empty.
function firstFilled(lines, at) {
  let next = at;
  while (next < lines.length && lines[next].trim() === "") next++;
  return next;
}

function isTable(lines, at) {
  const [head, rule] = [lines[at], lines[at + 1]?.trim() ?? ""];
  if (!head.includes("|") || !rule.includes("-") || !/[|:]/.test(rule)) return false;
  return head.length <= MAX_ROW_CHARS && rule.length <= MAX_ROW_CHARS && TABLE_RULE.test(rule);
}

function readTable(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end++;
  return [end, () => {
    const sides = splitRow(lines[at + 1]).map((cell) => {
      if (!cell.endsWith(":")) return "";
      return cell.startsWith(":") ? "center" : "right";
    });
    const row = (tag, line) => {
      const cells = splitRow(line);
      return make("tr", {}, ...sides.map((side, i) =>
        make(tag, side ? { class: side } : {}, ...inline(cells[i] ?? ""))));
    };
    return make("div", { class: "table" }, make("table", {},
      make("thead", {}, row("th", lines[at])),
      make("tbody", {}, ...lines.slice(at + 2, end).map((line) => row("td", line)))));
  }];
}

function splitRow(line) {
  const cells = [""];
  const text = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\" && text[i + 1] === "|") cells[cells.length - 1] += text[++i];
    else if (text[i] === "|") cells.push("");
    else cells[cells.length - 1] += text[i];
  }
  return cells.map((cell) => cell.trim());
}

function build(lines, depth) {
  return parseBlocks(lines, depth).map((block) => block.build());
}

// Columns of white space at the line's start; a tab counts for four.
function indentOf(line) {
  let n = 0;
  for (const char of line) {
    if (char === " ") n++;
    else if (char === "\t") n += 4;
    else break;
  }
  return n;
}

// The line with at most `n` columns of its indent taken away.
function unindent(line, n) {
  let at = 0;
  for (let column = 0; column < n && (line[at] === " " || line[at] === "\t"); at++) {
    column += line[at] === "\t" ? 4 : 1;
  }
  return line.slice(at);
}

// ---- within a line

const MARKS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };
const ADDRESS = /https?:\/\/[^\s<>"'`*[\]]+/y;
const TARGET = /\(\s?<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?: +"[^"]*")?\)/y;

// The nodes of text with emphasis, code and links.
export function inline(text) {
  return new InlineReader(text).read();
}

// Open marks are frames on a stack; what is still open where an outer one closes, or at the end,
// was no mark and becomes text again.
class InlineReader {
  #text;
  #at = 0;
  #plain = "";
  #frames = [{ mark: "", nodes: [] }];
  #ticks = null;

  constructor(text) {
    this.#text = text;
  }

  read() {
    while (this.#at < this.#text.length) this.#step();
    this.#flush();
    this.#dissolve(1);
    return this.#frames[0].nodes;
  }

  #step() {
    const [text, at] = [this.#text, this.#at];
    const char = text[at];
    if (char === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) this.#take(2, text[at + 1]);
    else if (char === "`") this.#readCode();
    else if (char === "*" || char === "_" || char === "~") this.#readMarks(char);
    else if (char === "[") this.#open("[", 1);
    else if (char === "!" && text[at + 1] === "[") this.#open("![", 2);
    else if (char === "]") this.#closeLink();
    else if (char === "h" && text.startsWith("http", at)) this.#readAddress();
    else this.#take(1, char);
  }

  // Go on by `n` characters, which read `plain`.
  #take(n, plain) {
    this.#at += n;
    this.#plain += plain;
  }

  #flush() {
    if (this.#plain) this.#frames.at(-1).nodes.push(document.createTextNode(this.#plain));
    this.#plain = "";
  }

  #add(node) {
    this.#flush();
    this.#frames.at(-1).nodes.push(node);
  }

  #readCode() {
    const n = this.#run("`");
    const from = this.#at + n;
    const close = this.#closingTicks(n, from);
    if (close === undefined) {
      this.#take(n, "`".repeat(n));
      return;
    }
    const code = this.#text.slice(from, close);
    const isPadded = code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "";
    this.#add(make("code", {}, isPadded ? code.slice(1, -1) : code));
    this.#at = close + n;
  }

  // Where the next run of exactly `n` backticks begins. All runs are found once.
  #closingTicks(n, from) {
    if (this.#ticks === null) {
      this.#ticks = new Map();
      for (const { 0: run, index } of this.#text.matchAll(/`+/g)) {
        if (!this.#ticks.has(run.length)) this.#ticks.set(run.length, []);
        this.#ticks.get(run.length).push(index);
      }
    }
    const places = this.#ticks.get(n) ?? [];
    while (places.length && places[0] < from) places.shift();
    return places[0];
  }

  #run(char) {
    let end = this.#at;
    while (this.#text[end] === char) end++;
    return end - this.#at;
  }

  #readMarks(char) {
    let n = this.#run(char);
    if (n > 3 || (char === "~" && n !== 2)) {
      this.#take(n, char.repeat(n));
      return;
    }
    const before = this.#text[this.#at - 1] ?? " ";
    const after = this.#text[this.#at + n] ?? " ";
    const isWord = (other) => char === "_" && /[\p{L}\p{N}]/u.test(other);
    const canClose = !/\s/.test(before) && !isWord(after);
    const canOpen = !/\s/.test(after) && !isWord(before);
    while (n > 0) {
      const length = canClose ? this.#innermost(char, n) : 0;
      if (length) {
        this.#close(char.repeat(length));
        n -= length;
      } else {
        const mark = char.repeat(Math.min(n, 2));
        if (canOpen) this.#open(mark, mark.length);
        else this.#take(mark.length, mark);
        n -= mark.length;
      }
    }
  }

  // The length of the innermost open mark of `char` that is not longer than `n`; 0: none is.
  #innermost(char, n) {
    const fits = ({ mark }) => mark[0] === char && mark.length <= n;
    return this.#frames.findLast(fits)?.mark.length ?? 0;
  }

  #open(mark, n) {
    if (this.#frames.length > MAX_INLINE_DEPTH) {
      this.#take(n, mark);
      return;
    }
    this.#flush();
    this.#at += n;
    this.#frames.push({ mark, nodes: [] });
  }

  #close(mark) {
    this.#at += mark.length;
    this.#flush();
    this.#dissolve(this.#frames.findLastIndex((frame) => frame.mark === mark) + 1);
    const { nodes } = this.#frames.pop();
    this.#frames.at(-1).nodes.push(make(MARKS[mark], {}, ...nodes));
  }

  // Make the frames from `index` on text again.
  #dissolve(index) {
    while (this.#frames.length > index) {
      const { mark, nodes } = this.#frames.pop();
      this.#frames.at(-1).nodes.push(document.createTextNode(mark), ...nodes);
    }
  }

  #closeLink() {
    const index = this.#frames.findLastIndex(({ mark }) => mark === "[" || mark === "![");
    if (index < 0) {
      this.#take(1, "]");
      return;
    }
    this.#flush();
    this.#dissolve(index + 1);
    const target = this.#match(TARGET, this.#at + 1);
    const address = target && webAddress(target[1]);
    if (!address) {
      this.#dissolve(index);
      this.#take(1, "]");
      return;
    }
    const { nodes } = this.#frames.pop();
    const link = makeLink(address, ...(nodes.length ? nodes : [address]));
    for (const inner of link.querySelectorAll("a")) inner.replaceWith(...inner.childNodes);
    this.#add(link);
    this.#at += 1 + target[0].length;
  }

  #readAddress() {
    const found = this.#match(ADDRESS, this.#at)?.[0].replace(/[.,;:!?]+$/, "") ?? "";
    const text = found.endsWith(")") && !found.includes("(") ? found.slice(0, -1) : found;
    const address = webAddress(text);
    if (!address) {
      this.#take(4, "http");
      return;
    }
    this.#add(makeLink(address, text));
    this.#at += text.length;
  }

  // What `pattern` (a sticky one) finds at `at`, of a bounded length.
  #match(pattern, at) {
    pattern.lastIndex = 0;
    return pattern.exec(this.#text.slice(at, at + MAX_LINK_CHARS));
  }
}

// `text` as an address of the web; null for any other scheme and for what is none.
function webAddress(text) {
  try {
    const { protocol, href } = new URL(text);
    return protocol === "https:" || protocol === "http:" ? href : null;
  } catch {
    return null;
  }
}

function makeLink(address, ...nodes) {
  return make("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...nodes);
}
