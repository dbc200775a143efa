// The right image is cut off where the range input stands, which works by pointer and by keys.

export default function ({ parentElement, data }) {
  const frame = parentElement.querySelector(".wipe");
  frame.style.aspectRatio = data.ratio;
  frame.querySelectorAll("img").forEach((img, i) => {
    if (img.src !== data.sides[i].image) img.src = data.sides[i].image;
    img.alt = data.sides[i].alt;
  });
  const range = frame.querySelector("input");
  range.oninput = () => frame.style.setProperty("--at", `${range.value}%`);
  range.oninput();
}
