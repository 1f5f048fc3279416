/** Load Pictures: a button that uploads a folder, and picture files dropped onto the node. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const NODE = "HollowLoadPictures";
// as in hollow_core/data/picture_file.py, and caption_files.py beside it
// prettier-ignore
const PICTURE = /\.(png|apng|jpg|jpeg|jpe|jfif|jif|mpo|webp|bmp|dib|gif|tif|tiff|tga|jp2|j2k|jpf|jpx|ppm|pgm|pbm|pnm|pfm|avif|heic|heif|hif)$/i;
const TEXT = /\.(txt|caption)$/i;
const TABLE = /^metadata\.(jsonl|csv)$/;

function say(severity, summary, detail) {
  app.extensionManager.toast.add({ severity, summary, detail, life: severity === "error" ? 20000 : 5000 });
}

/** The pictures directly in a chosen folder, and the texts beside them. */
function picturesAndTexts(files) {
  const direct = files.filter((file) => file.webkitRelativePath.split("/").length === 2 && !file.name.startsWith("."));
  const pictures = direct.filter((file) => PICTURE.test(file.name));
  const stem = (file) => file.name.replace(/\.[^.]*$/, "");
  const names = new Set(pictures.flatMap((file) => [stem(file), file.name])); // rex.txt or rex.jpg.txt
  const texts = direct.filter((file) => (TEXT.test(file.name) && names.has(stem(file))) || TABLE.test(file.name));
  return [...pictures, ...texts];
}

/** `name`, or `name 2` and so on: what is uploaded is never mixed with what is there. */
async function unused(name) {
  const answer = await api.fetchApi(`/object_info/${NODE}`);
  const [, { options }] = (await answer.json())[NODE].input.required.folder;
  const taken = new Set(options.map((path) => path.split("/")[0]));
  for (let number = 2, wanted = name; ; number++) {
    if (!taken.has(wanted)) return wanted;
    wanted = `${name} ${number}`;
  }
}

async function send(file, folder) {
  const body = new FormData();
  body.append("image", file, file.name);
  body.append("subfolder", folder);
  const answer = await api.fetchApi("/upload/image", { method: "POST", body });
  if (!answer.ok) throw new Error(`The server answered ${answer.status} ${answer.statusText}`);
}

/** Files into a folder of input/, which the node then has chosen. */
async function upload(node, name, files) {
  let folder = name;
  let sent = 0;
  try {
    folder = await unused(name);
    for (; sent < files.length; sent++) await send(files[sent], folder);
  } catch (error) {
    const there = sent ? ` ${sent} of ${files.length} files are in input/${folder}.` : "";
    say("error", `${files[sent].name} was not uploaded`, `${error.message}.${there}`);
    return;
  }
  const widget = node.widgets.find((each) => each.name === "folder");
  const listed = widget.options.values;
  await app.refreshComboInNodes();
  listed.splice(0, listed.length, ...widget.options.values); // Nodes 2.0 of front end 1.27 goes on with this very list
  widget.value = folder;
  widget.callback?.(folder);
  node.setDirtyCanvas(true, true);
  const pictures = files.filter((file) => PICTURE.test(file.name)).length;
  say("success", `Uploaded to input/${folder}`, `Pictures: ${pictures}, captions: ${files.length - pictures}.`);
}

function chooseFolder(node) {
  const chooser = document.createElement("input");
  chooser.type = "file";
  chooser.webkitdirectory = true;
  chooser.onchange = () => {
    const files = picturesAndTexts([...chooser.files]);
    const [name] = (chooser.files[0]?.webkitRelativePath ?? "").split("/");
    if (files.length) upload(node, name, files);
    else say("error", "Nothing was uploaded", `${name || "The folder"} holds no pictures. Choose the one that does.`);
  };
  chooser.click();
}

/** Room for the first contact sheet, as the canvas gives a preview 220 pixels of height; later the user's size stays. */
function showSheetLarge(node) {
  node.widgets.find((each) => each.name === "caption").options.getMaxHeight = () => 80; // the rest is the sheet's
  const bare = node.computeSize()[1] + 50;
  const shown = node.onExecuted;
  let first = true;
  node.onExecuted = function (output) {
    shown?.apply(this, arguments);
    if (!first || LiteGraph.vueNodesMode || !output?.images?.length) return;
    first = false;
    const sheet = new Image();
    sheet.onload = () => {
      const height = (node.size[0] / sheet.naturalWidth) * sheet.naturalHeight;
      node.setSize([node.size[0], Math.max(node.size[1], bare + Math.min(height, sheet.naturalHeight))]);
      node.setDirtyCanvas(true, true);
    };
    sheet.src = api.apiURL(`/view?${new URLSearchParams(output.images[0])}`);
  };
}

// Nodes 2.0 leaves a preview at 220 pixels where a text can grow above it; here it is as high as its width makes it.
document.head.appendChild(document.createElement("style")).textContent = `
  .lg-node:has([node-type="${NODE}"]) .image-preview img { position: static !important; height: auto !important; }`;

app.registerExtension({
  name: "hollow.loadPictures",
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const button = node.addWidget("button", "upload a folder", null, () => chooseFolder(node), { serialize: false });
    button.serialize = false; // or a saved graph would hold a value for it
    showSheetLarge(node);
    node.onDragOver = (event) => [...(event.dataTransfer?.items ?? [])].some((item) => item.kind === "file");
    node.onDragDrop = (event) => {
      const files = [...event.dataTransfer.files].filter((file) => PICTURE.test(file.name));
      if (files.length) upload(node, "pictures", files);
      return files.length > 0;
    };
  },
});
