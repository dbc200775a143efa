// An image with boxes over it: drawn, dragged, sized by corners or by keys. What was done is told once it is done; Python
// answers with new data, which is drawn as it is. Names are set as text, never as markup.

const LEAST = 8; // pixels of a side
const GRID = 4; // pixels that pointers snap to
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const CORNERS = { nw: [0, 1], ne: [2, 1], sw: [0, 3], se: [2, 3] };

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const snap = (value) => Math.round(value / GRID) * GRID;

function moved([left, top, right, bottom], dx, dy, { width, height }) {
  const x = clamp(left + dx, 0, width - (right - left));
  const y = clamp(top + dy, 0, height - (bottom - top));
  return [x, y, x + right - left, y + bottom - top];
}

function sized(box, corner, dx, dy, { width, height }) {
  const [i, j] = CORNERS[corner];
  const next = [...box];
  next[i] = i === 0 ? clamp(box[0] + dx, 0, box[2] - LEAST) : clamp(box[2] + dx, box[0] + LEAST, width);
  next[j] = j === 1 ? clamp(box[1] + dy, 0, box[3] - LEAST) : clamp(box[3] + dy, box[1] + LEAST, height);
  return next;
}

function spanned(from, to, { width, height }) {
  const [left, right] = [from.x, to.x].sort((a, b) => a - b);
  const [top, bottom] = [from.y, to.y].sort((a, b) => a - b);
  const x = clamp(left, 0, width - LEAST);
  const y = clamp(top, 0, height - LEAST);
  return [x, y, clamp(right, x + LEAST, width), clamp(bottom, y + LEAST, height)];
}

function place(element, [left, top, right, bottom], { width, height }) {
  element.style.left = `${(100 * left) / width}%`;
  element.style.top = `${(100 * top) / height}%`;
  element.style.width = `${(100 * (right - left)) / width}%`;
  element.style.height = `${(100 * (bottom - top)) / height}%`;
}

function describe(element, name, box) {
  element.setAttribute("aria-label", `Box of ${name}: left ${box[0]}, top ${box[1]}, right ${box[2]}, bottom ${box[3]}`);
}

function show(stage, { width, height, image, alt, next }) {
  const img = stage.querySelector("img");
  stage.style.aspectRatio = `${width} / ${height}`;
  stage.style.setProperty("--ratio", width / height);
  stage.classList.toggle("painted", image !== null);
  stage.querySelector(".hint").hidden = image !== null;
  stage.querySelector(".next").textContent = next;
  img.hidden = image === null;
  if (image !== null && img.src !== image) img.src = image;
  img.alt = alt;
}

// Moves labels down until none is over another, as far as their boxes reach.
function separate(elements) {
  const seen = [];
  for (const element of elements) {
    const label = element.querySelector(".label");
    label.style.top = "";
    const meets = () => {
      const a = label.getBoundingClientRect();
      return seen.find((b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom);
    };
    for (let other = meets(), tries = 0; other && tries < elements.length; other = meets(), tries += 1) {
      label.style.top = `${other.bottom - element.getBoundingClientRect().top + 1}px`;
    }
    seen.push(label.getBoundingClientRect());
  }
}

const BRUSH = 0.05; // radius as a share of the longer side
const FINEST = 512; // pixels of the longer side of a mask

// A layer over the image on which one paints what is to change; told as a PNG once the brush is lifted.
function brushed(stage, { width, height, paint }, tell) {
  let layer = stage.querySelector("canvas");
  if (!paint) {
    layer?.remove();
    return false;
  }
  if (!layer) {
    layer = document.createElement("canvas");
    layer.setAttribute("role", "img");
    layer.setAttribute("aria-label", "What you paint changes");
    const scale = Math.min(1, FINEST / Math.max(width, height));
    layer.width = Math.round(width * scale);
    layer.height = Math.round(height * scale);
    stage.append(layer);
  }
  const context = layer.getContext("2d");
  if (layer.dataset.mask !== paint.key) {
    layer.dataset.mask = paint.key;
    const mask = new Image();
    mask.onload = () => {
      // Grey says where: white is painted, black is not.
      context.clearRect(0, 0, layer.width, layer.height);
      context.drawImage(mask, 0, 0, layer.width, layer.height);
      const pixels = context.getImageData(0, 0, layer.width, layer.height);
      for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i] > 127 ? 255 : 0;
      context.putImageData(pixels, 0, 0);
    };
    if (paint.mask) mask.src = paint.mask;
    else context.clearRect(0, 0, layer.width, layer.height);
  }
  const dot = (event) => {
    const frame = layer.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * layer.width;
    const y = ((event.clientY - frame.top) / frame.height) * layer.height;
    context.lineTo(x, y);
    context.stroke();
  };
  stage.onpointerdown = (event) => {
    event.preventDefault();
    stage.setPointerCapture(event.pointerId);
    context.strokeStyle = "#fff";
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = 2 * BRUSH * Math.max(layer.width, layer.height);
    context.beginPath();
    dot(event);
    stage.onpointermove = dot;
    stage.onpointerup = stage.onpointercancel = () => {
      stage.onpointermove = stage.onpointerup = stage.onpointercancel = null;
      tell(layer.toDataURL("image/png"));
    };
  };
  return true;
}

export default function ({ parentElement, data, setTriggerValue }) {
  const stage = parentElement.querySelector(".stage");
  show(stage, data);
  if (stage.onpointermove) return; // a box is being dragged, and told once it is let go
  const canvas = { width: data.width, height: data.height };
  const focused = stage.contains(parentElement.activeElement) ? parentElement.activeElement.dataset.id : null;
  for (const box of stage.querySelectorAll(".box")) box.remove();
  stage.classList.toggle("drawable", data.boxes.length > 0 || data.paint !== null);
  if (brushed(stage, data, (mask) => setTriggerValue("mask", mask))) return;
  if (!data.boxes.some(({ id }) => String(id) === stage.dataset.chosen)) {
    stage.dataset.chosen = data.boxes.length ? String(data.boxes[0].id) : "";
  }

  const at = (event) => {
    const frame = stage.getBoundingClientRect();
    return {
      x: snap(((event.clientX - frame.left) / frame.width) * data.width),
      y: snap(((event.clientY - frame.top) / frame.height) * data.height),
    };
  };
  const tell = (id, box) => setTriggerValue("drawn", { id, box });
  const elements = new Map();
  const choose = (id) => {
    stage.dataset.chosen = String(id);
    for (const [other, element] of elements) element.classList.toggle("chosen", other === id);
  };

  // Follows the pointer until it is let go; `change` makes a box of where it is.
  const follow = (event, item, change) => {
    event.preventDefault();
    event.stopPropagation();
    const start = at(event);
    const element = elements.get(item.id);
    let box = item.box;
    choose(item.id);
    element.focus({ preventScroll: true });
    stage.setPointerCapture(event.pointerId);
    stage.onpointermove = (next) => {
      box = change(start, at(next));
      place(element, box, canvas);
      describe(element, item.name, box);
      separate([...elements.values()]);
    };
    stage.onpointerup = stage.onpointercancel = () => {
      stage.onpointermove = stage.onpointerup = stage.onpointercancel = null;
      if (String(box) !== String(item.box)) tell(item.id, box);
    };
  };

  for (const item of data.boxes) {
    const element = document.createElement("div");
    element.className = "box";
    element.tabIndex = 0;
    element.setAttribute("role", "group");
    element.dataset.id = item.id;
    element.style.setProperty("--concept", item.colour);
    const label = document.createElement("span");
    label.className = "label";
    label.textContent = item.name;
    element.append(label);
    for (const corner of Object.keys(CORNERS)) {
      const handle = document.createElement("span");
      handle.className = `corner ${corner}`;
      handle.onpointerdown = (event) =>
        follow(event, item, (from, to) => sized(item.box, corner, to.x - from.x, to.y - from.y, canvas));
      element.append(handle);
    }
    element.onpointerdown = (event) =>
      follow(event, item, (from, to) => moved(item.box, to.x - from.x, to.y - from.y, canvas));
    element.onfocus = () => choose(item.id);
    element.onkeydown = (event) => {
      const direction = KEYS[event.key];
      if (!direction) return;
      event.preventDefault();
      const [dx, dy] = direction.map((step) => step * GRID);
      item.box = event.shiftKey ? sized(item.box, "se", dx, dy, canvas) : moved(item.box, dx, dy, canvas);
      place(element, item.box, canvas);
      describe(element, item.name, item.box);
      separate([...elements.values()]);
      clearTimeout(stage.telling);
      stage.telling = setTimeout(() => tell(item.id, item.box), 350);
    };
    place(element, item.box, canvas);
    describe(element, item.name, item.box);
    elements.set(item.id, element);
    stage.append(element);
  }
  stage.onpointerdown = (event) => {
    const item = data.boxes.find(({ id }) => String(id) === stage.dataset.chosen);
    if (item) follow(event, item, (from, to) => spanned(from, to, canvas));
  };
  separate([...elements.values()]);
  if (stage.dataset.chosen) choose(Number(stage.dataset.chosen));
  if (focused !== null) elements.get(Number(focused))?.focus({ preventScroll: true });
}
