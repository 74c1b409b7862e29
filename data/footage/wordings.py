"""How people ask for each edit: many wordings, with the strength that each means.

A wording is text with `{color}`, `{shape}`, `{to}`, `{side}` or `{place}` left open.
"""

from __future__ import annotations

GENTLE, PLAIN, STRONG = 0.55, 1.0, 1.45

# kind: wordings of each strength
LOOK_WORDS: dict[str, dict[float, tuple[str, ...]]] = {
    "night": {
        GENTLE: ("make it evening", "make it dusk", "turn it into evening"),
        PLAIN: ("make it night", "turn day into night", "make it look like night",
                "turn it into a night scene", "change the scene to night", "night"),
        STRONG: ("make it a dark night", "make it a very dark night", "turn it into deep night"),
    },
    "sunset": {
        GENTLE: ("add a little sunset light", "make it a faint sunset"),
        PLAIN: ("make it sunset", "turn it into a sunset", "make it look like sunset",
                "change the scene to sunset", "sunset", "give it sunset light"),
        STRONG: ("make it a strong sunset", "make it a glowing sunset"),
    },
    "warm": {
        GENTLE: ("make it a little warmer", "make it slightly warmer"),
        PLAIN: ("make it warmer", "make the colors warm", "give it warm colors", "warmer",
                "make the picture warm"),
        STRONG: ("make it much warmer", "make it very warm"),
    },
    "cold": {
        GENTLE: ("make it a little colder", "make it slightly colder", "make it a little cooler"),
        PLAIN: ("make it colder", "make the colors cold", "give it cold colors", "colder",
                "make the picture cold", "make it cooler"),
        STRONG: ("make it much colder", "make it very cold"),
    },
    "faded": {
        GENTLE: ("make it a little faded", "make it slightly faded"),
        PLAIN: ("make it faded", "fade the colors", "make it look faded", "wash out the colors",
                "make it look like an old faded photo"),
        STRONG: ("make it very faded", "fade the colors strongly"),
    },
    "contrast": {
        GENTLE: ("raise the contrast a little", "a little more contrast"),
        PLAIN: ("raise the contrast", "make it high contrast", "more contrast",
                "increase the contrast", "give it high contrast"),
        STRONG: ("raise the contrast a lot", "make it very high contrast", "much more contrast"),
    },
    "bright": {
        GENTLE: ("make it a little brighter", "make it slightly brighter"),
        PLAIN: ("make it brighter", "brighten it", "brighten the picture", "brighter",
                "brighten the video"),
        STRONG: ("make it much brighter", "make it very bright"),
    },
    "dark": {
        GENTLE: ("make it a little darker", "make it slightly darker"),
        PLAIN: ("make it darker", "darken it", "darken the picture", "darker", "darken the video"),
        STRONG: ("make it much darker", "make it very dark"),
    },
    "colourless": {
        GENTLE: ("make the colors a little paler", "make it less colorful", "less color"),
        PLAIN: ("make it black and white", "turn it black and white", "remove the color",
                "black and white", "turn it into a black and white video", "make it gray",
                "make it grayscale", "remove all color"),
    },
    "vivid": {
        GENTLE: ("make it a little more colorful", "make the colors slightly stronger"),
        PLAIN: ("make it more colorful", "make the colors stronger", "make it vivid",
                "more color", "make the colors vivid"),
        STRONG: ("make it much more colorful", "make the colors very strong"),
    },
    "sepia": {
        GENTLE: ("make it a little sepia", "add a little sepia"),
        PLAIN: ("make it sepia", "turn it sepia", "give it a sepia tone", "sepia",
                "make it look like an old brown photo", "add a sepia tone"),
    },
    "negative": {
        PLAIN: ("invert the colors", "make it a negative", "turn it into a negative",
                "negative", "invert it"),
    },
    "fog": {
        GENTLE: ("add a little fog", "add some mist", "make it slightly foggy"),
        PLAIN: ("add fog", "make it foggy", "fill the scene with fog", "fog", "put it in fog",
                "make it misty"),
        STRONG: ("add thick fog", "add a lot of fog", "make it very foggy"),
    },
    "sketch": {
        GENTLE: ("make it a light pencil sketch", "turn it into a faint sketch"),
        PLAIN: ("make it a sketch", "turn it into a pencil sketch", "make it look like a sketch",
                "sketch", "draw it with a pencil", "turn it into a pencil drawing"),
        STRONG: ("make it a dark pencil sketch", "turn it into a strong sketch"),
    },
    "cartoon": {
        PLAIN: ("make it a cartoon", "turn it into a cartoon", "make it look like a cartoon",
                "cartoon", "make it look like a comic", "turn it into a comic"),
    },
    "mosaic": {
        GENTLE: ("make it a fine mosaic", "make it a mosaic of small squares"),
        PLAIN: ("make it a mosaic", "turn it into a mosaic", "mosaic", "pixelate it",
                "make it pixelated"),
        STRONG: ("make it a coarse mosaic", "make it a mosaic of large squares"),
    },
    "soft": {
        GENTLE: ("blur it a little", "make it slightly blurry"),
        PLAIN: ("blur it", "make it blurry", "blur the picture", "blur", "blur the video"),
        STRONG: ("blur it a lot", "make it very blurry"),
    },
    "corners": {
        GENTLE: ("darken the corners a little",),
        PLAIN: ("darken the corners", "make the corners dark", "add a vignette", "vignette"),
        STRONG: ("make the corners very dark", "add a strong vignette"),
    },
    "snow": {
        GENTLE: ("add a little snow", "make it snow a little"),
        PLAIN: ("make it snow", "add snow", "add falling snow", "let it snow", "snow"),
        STRONG: ("make it snow a lot", "add heavy snow"),
    },
    "rain": {
        GENTLE: ("add a little rain", "make it rain a little"),
        PLAIN: ("make it rain", "add rain", "add falling rain", "let it rain", "rain"),
        STRONG: ("make it rain a lot", "add heavy rain"),
    },
    "light": {
        GENTLE: ("light up the {side} a little", "add a little light from the {side}"),
        PLAIN: ("light up the {side}", "add light from the {side}", "light it from the {side}",
                "put a light on the {side}", "brighten the {side} side"),
        STRONG: ("add strong light from the {side}", "light it strongly from the {side}"),
    },
}  # fmt: skip

PART_WORDS: dict[str, tuple[str, ...]] = {
    "hue": (
        "make the {color} things {to}", "turn everything {color} {to}",
        "make everything that is {color} {to}", "change {color} to {to}",
        "recolor the {color} things {to}", "turn the {color} parts {to}",
    ),
    "drain": (
        "remove the color {color}", "make the {color} things gray",
        "take the color out of the {color} things", "turn everything {color} gray",
    ),
    "recolor": (
        "make the {color} {shape} {to}", "turn the {color} {shape} {to}",
        "paint the {color} {shape} {to}", "change the color of the {color} {shape} to {to}",
        "color the {color} {shape} {to}",
    ),
    "replace": (
        "turn the {color} {shape} into a {to}", "change the {color} {shape} into a {to}",
        "replace the {color} {shape} with a {to}", "make the {color} {shape} a {to}",
    ),
    "remove": (
        "remove the {color} {shape}", "delete the {color} {shape}", "erase the {color} {shape}",
        "take away the {color} {shape}", "take the {color} {shape} out",
        "erase the {color} {shape} from the video",
    ),
    "add": (
        "add a {color} {shape} {place}", "put a {color} {shape} {place}",
        "draw a {color} {shape} {place}", "place a {color} {shape} {place}",
    ),
    "blur_background": (
        "blur the background", "make the background blurry", "blur what is behind the {shape}",
        "blur everything but the {color} {shape}",
    ),
    "dark_background": (
        "darken the background", "make the background dark", "make the background darker",
        "darken everything but the {color} {shape}",
    ),
    "gray_background": (
        "make the background black and white", "remove the color of the background",
        "make the background gray", "make everything but the {color} {shape} gray",
    ),
}  # fmt: skip

JOINS = ("{a} and {b}", "{a}, then {b}", "{b} and {a}")  # a: of a part, b: of the whole picture
SIDES = ("left", "right", "top", "bottom")
