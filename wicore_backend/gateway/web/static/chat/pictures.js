// Pictures on their way to a model: made small and drawn anew, so that what the camera wrote beside them (places,
// names) stays here.

const LONGEST_SIDE = 1792; // twice the side of what Gemma-3 sees at once
const JPEG_QUALITY = 0.92;
const LARGEST_PNG = 1_500_000; // bytes; above it a JPEG is sent

export const MOST_PICTURES = 8;

/** Not a picture, or one that this browser cannot read. */
export class BadPictureError extends Error {
  constructor(name) {
    super(name);
    this.fileName = name;
  }
}

/** {name, width, height, data}: a PNG or JPEG of sane size. @throws BadPictureError */
export async function prepare(file) {
  const name = file.name || "picture";
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new BadPictureError(name);
  }
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const keepsEdges = file.type === "image/png" || file.type === "image/gif";
  let data = keepsEdges ? await drawn(bitmap, width, height, "image/png") : null;
  if (data === null || data.size > LARGEST_PNG) data = await drawn(bitmap, width, height, "image/jpeg");
  bitmap.close();
  return { name, width, height, data };
}

async function drawn(bitmap, width, height, type) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  if (type === "image/jpeg") {
    context.fillStyle = "white"; // it has no transparency
    context.fillRect(0, 0, width, height);
  }
  context.drawImage(bitmap, 0, 0, width, height);
  return canvas.convertToBlob({ type, quality: JPEG_QUALITY });
}

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** The files of a paste or a drop that claim to be pictures. */
export function filesOf(transfer) {
  return [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
}

/** An element that shows a picture, and forgets its URL once it has been read. */
export function pictureElement(picture, alt) {
  const image = new Image();
  image.alt = alt;
  image.src = URL.createObjectURL(picture.data);
  image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
  return image;
}
