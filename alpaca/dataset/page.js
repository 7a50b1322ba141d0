// Hovering (or focusing) an arc names it and its count in the hole; clicking lists its examples.
const examples = JSON.parse(document.getElementById("examples").textContent);

for (const section of document.querySelectorAll("section[data-set]")) {
  const [name, count] = section.querySelectorAll(".hole");
  const panel = section.querySelector(".examples");
  const show = (arc) => {
    name.textContent = arc.dataset.name;
    count.firstElementChild.textContent = arc.dataset.count;
  };
  const list = (arc) => {
    section.querySelector(".chosen")?.classList.remove("chosen");
    arc.classList.add("chosen");
    arc.parentNode.insertBefore(arc, arc.parentNode.querySelector("text")); // above its neighbours
    const heading = document.createElement("p");
    heading.textContent = `${arc.dataset.name}: ${arc.dataset.count}`;
    const items = document.createElement("ol");
    for (const text of examples[section.dataset.set][arc.dataset.arc]) {
      const item = document.createElement("li");
      item.textContent = text;
      items.append(item);
    }
    panel.replaceChildren(heading, items);
  };
  for (const arc of section.querySelectorAll("path[data-arc]")) {
    arc.addEventListener("pointerenter", () => show(arc));
    arc.addEventListener("focus", () => show(arc));
    arc.addEventListener("click", () => list(arc));
    arc.addEventListener("keydown", (event) => event.key === "Enter" && list(arc));
  }
}
