// The tree of one step as SVG. Text of the model reaches the page as text nodes only.

const SVG = "http://www.w3.org/2000/svg";
const COLUMN = 86;
const ROW = 24;
const MARGIN = 20;
const LABEL = 9;

function svg(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// A token's text with its blanks made visible; shortened to fit its column unless `whole`.
function visible(text, whole = false) {
  const shown = text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "→") || "∅";
  const letters = [...shown];
  return whole || letters.length <= LABEL ? shown : letters.slice(0, LABEL - 1).join("") + "…";
}

// Parents come before their children; a leaf takes the next row, a parent stands level with its children's middle.
function layOut(tree) {
  const nodes = tree.tokens.map((text, index) => {
    const parent = tree.parent[index];
    return { index, text, parent: parent === index || parent < 0 ? null : parent, children: [], depth: 0, y: 0 };
  });
  for (const node of nodes) {
    if (node.parent === null) continue;
    nodes[node.parent].children.push(node.index);
    node.depth = nodes[node.parent].depth + 1;
  }
  let rows = 0;
  const place = (node) => {
    node.children.forEach((child) => place(nodes[child]));
    const [first, last] = [nodes[node.children[0]], nodes[node.children.at(-1)]];
    node.y = first ? (first.y + last.y) / 2 : rows++;
  };
  nodes.filter((node) => node.parent === null).forEach(place);
  return { nodes, rows, columns: Math.max(0, ...nodes.map((node) => node.depth)) + 1 };
}

function centre(node) {
  return [MARGIN + node.depth * COLUMN, MARGIN + node.y * ROW];
}

// Draw `tree` into `picture`; `tell` gets a sentence on the node that is focused or pointed at.
function drawTree(picture, tree, tell) {
  const { nodes, rows, columns } = layOut(tree);
  const accepted = new Set(tree.accepted);
  const [width, height] = [columns * COLUMN + MARGIN, rows * ROW + MARGIN];
  const groups = nodes.map((node) => nodeGroup(node, accepted));
  const edges = nodes.filter((node) => node.parent !== null).map((node) => edge(nodes[node.parent], node, accepted));
  picture.replaceChildren(...edges, ...groups);
  picture.setAttribute("width", width);
  picture.setAttribute("height", height);
  const path = nodes.filter((node) => node.parent !== null && accepted.has(node.index));
  const agreed = path.map((node) => node.text).join("") || "none";
  picture.setAttribute("aria-label", `tree of ${nodes.length} nodes; the model agreed to ${path.length}: ${agreed}`);
  groups.forEach((group, index) => {
    const say = () => tell(sentence(nodes[index], accepted));
    group.addEventListener("focus", say);
    group.addEventListener("pointerenter", say);
  });
  picture.onkeydown = (event) => {
    const from = groups.indexOf(document.activeElement);
    const to = from < 0 ? null : neighbour(nodes, from, event.key, accepted);
    if (to === null) return;
    event.preventDefault();
    groups[from].setAttribute("tabindex", "-1");
    groups[to].setAttribute("tabindex", "0");
    groups[to].focus();
  };
}

function nodeGroup(node, accepted) {
  const [x, y] = centre(node);
  const kind = node.parent === null ? "root" : accepted.has(node.index) ? "accepted" : "";
  const group = svg("g", {
    class: `node ${kind}`.trim(),
    tabindex: node.parent === null ? "0" : "-1",
    role: "img",
    "aria-label": sentence(node, accepted),
  });
  group.append(
    svg("circle", { cx: x, cy: y, r: 5 }),
    svg("text", { x: x + 6, y: y - 6 }, visible(node.text)),
    svg("title", {}, visible(node.text, true)),
  );
  return group;
}

// Level past the parent's label, which stands above the line, then up or down to the child.
function edge(parent, node, accepted) {
  const [[x1, y1], [x2, y2]] = [centre(parent), centre(node)];
  const kind = accepted.has(node.index) ? "edge accepted" : "edge";
  return svg("path", { class: kind, d: `M${x1} ${y1}H${x2 - 12}V${y2}H${x2}` });
}

function sentence(node, accepted) {
  if (node.parent === null) return `“${visible(node.text, true)}”: the root, a token that was certain before this step`;
  const verdict = accepted.has(node.index) ? "agreed to by the model" : "not taken";
  return `“${visible(node.text, true)}”: drafted token ${node.depth}, ${verdict}`;
}

// Arrow keys: left to the parent, right to the accepted or first child, up and down within a depth.
function neighbour(nodes, index, key, accepted) {
  const node = nodes[index];
  if (key === "ArrowLeft") return node.parent;
  if (key === "ArrowRight") return node.children.find((child) => accepted.has(child)) ?? node.children[0] ?? null;
  if (key !== "ArrowUp" && key !== "ArrowDown") return null;
  const level = nodes.filter((other) => other.depth === node.depth).sort((a, b) => a.y - b.y);
  const to = level[level.indexOf(node) + (key === "ArrowDown" ? 1 : -1)];
  return to === undefined ? null : to.index;
}
