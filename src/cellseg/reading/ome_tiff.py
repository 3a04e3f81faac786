"""The description of an OME-TIFF that is spread over several files."""

from __future__ import annotations

from xml.etree import ElementTree


def own_part(description: str) -> str | None:
    """What the description of an OME-TIFF says of the file that it is in, when that is a part.

    Args:
        description: OME-XML, in which every plane may lie in another file.

    Returns:
        OME-XML of the image, the channels, slices and times of this file alone; None where the
        description does not say which planes are in it.
    """
    root = ElementTree.fromstring(description)
    files = {uuid.text for uuid in root.iterfind(".//{*}UUID")}
    file = root.get("UUID") or (files.pop() if len(files) == 1 else None)
    if file is None:
        return None
    root.set("UUID", file)
    for image in root.findall("{*}Image"):
        pixels = image.find("{*}Pixels")
        planes = [] if pixels is None else pixels.findall("{*}TiffData")
        own = [plane for plane in planes if plane.findtext("{*}UUID") == file]
        if pixels is None or not own:
            root.remove(image)
            continue
        channels = pixels.findall("{*}Channel")
        if any(int(plane.get("PlaneCount", 1)) > 1 for plane in own):
            return None
        if any(int(channel.get("SamplesPerPixel", 1)) > 1 for channel in channels):
            return None
        for plane in planes:
            if plane not in own:
                pixels.remove(plane)
        for axis in "CZT":
            places = [int(plane.get(f"First{axis}", 0)) for plane in own]
            kept = sorted(set(places))
            pixels.set(f"Size{axis}", str(len(kept)))
            for plane, place in zip(own, places, strict=True):
                plane.set(f"First{axis}", str(kept.index(place)))
            if axis == "C":
                for number, channel in enumerate(channels):
                    if number not in kept:
                        pixels.remove(channel)
    part = ElementTree.tostring(root, encoding="unicode")
    return part if root.find("{*}Image") is not None else None
