"""What is the same in two scripts is the same to the letter.

This is for those who maintain all four scripts: a fix in one of them belongs into the others, too.
In a fork, where you change the one that you need, delete this file.
"""

import ast
import difflib
import inspect
import re
import textwrap

import pytest

import ddim_unet_mnist as ddim
import ddpm_unet_mnist as ddpm
import dit_cifar10 as dit
import uvit_cifar10 as uvit

# These functions and classes may differ, and are free in all they do.
FREE = {
    (dit, uvit): ["Attention", "Block"],
    (dit, ddim): ["Block", "denoiser"],
    (dit, ddpm): ["Block", "denoiser", "ddim_sample", "loss", "schedule"],
    (ddim, ddpm): ["Block", "denoiser", "ddim_sample", "loss", "schedule", "UNet", "meaning"],
}

# In these functions some lines may differ. Each such line has to hold one of the words.
WORDS = {
    "load": "UNet( shape meaning(",
    "main": """args.sample_only args.interpolate args.dim class_names classes try: ValueError
        prompt invert else: args.n) draw(""",
    "make_parser": """drawing: --classes --prompt --interpolate --invert --sampler --steps
        --guidance interval "-n" --schedule --data-dir --batch-size --max-steps "--lr" --warmup
        "--ema" --dim --depth --heads --patch caches""",
    "meaning": "meaning( schedule( round( measured",
    "resume": "schedule",
    "train": """class_names UNet( optimizer Muon vars(args) "script" meaning(
        schedule( u[:, later illustrate( draw(""",
    "validate": "batch( illustrate(",
    "draw": """draw( args.n len(y) rows asked denoiser( interpolate WORDS[
        picture(image[None])""",
}

# The two transformers differ in their networks, and so in the flags of the network alone.
WORDS_OF_TRANSFORMERS = {
    "main": "args.dim args.depth",
    "make_parser": "--depth",
}

ADVICE = """
{name} in {one}.py and in {other}.py is not the same any more:
{lines}
Make it the same, or say in {test} that it may differ.
This test is for those who maintain all four scripts; in a fork, delete it."""


def own_names(script):
    """The functions and classes that are written in this script."""
    names = set()
    for name, value in vars(script).items():
        is_code = inspect.isfunction(value) or inspect.isclass(value)
        if is_code and value.__module__ == script.__name__:
            names.add(name)
    return names


def source(script, name):
    """The lines of a function or class without its docstring, a lone bracket joined to the next."""
    text = inspect.getsource(vars(script)[name])
    lines = text.splitlines()
    (definition,) = ast.parse(textwrap.dedent(text)).body
    if ast.get_docstring(definition):
        docstring = definition.body[0]
        del lines[docstring.lineno - 1 : docstring.end_lineno]
    text = "\n".join(lines).replace("UViT(", "DiT(")
    text = re.sub(r"(?<=[(\[{])\n\s*", "", text)
    text = re.sub(r",?\n\s*(?=[)\]}])", "", text)
    return text.splitlines()


def difference(one, other):
    """The lines that only one of the two has, each with - or + before it."""
    return [line for line in difflib.ndiff(one, other) if line.startswith(("-", "+"))]


@pytest.mark.parametrize("one, other", FREE, ids=lambda script: script.NAME)
def test_what_is_the_same_in_two_scripts_is_the_same_to_the_letter(one, other):
    words = WORDS_OF_TRANSFORMERS if other is uvit else WORDS
    both = own_names(one) & own_names(other)
    for name in sorted(both.difference(FREE[one, other])):
        one_source = source(one, name)
        other_source = source(other, name)
        lines = difference(one_source, other_source)
        known = words.get(name, "").split()
        strange = [line for line in lines if not any(word in line for word in known)]
        too_many = len(lines) > 0.4 * len(one_source + other_source)
        assert not strange and not too_many, ADVICE.format(
            name=name,
            one=one.NAME,
            other=other.NAME,
            lines="\n".join(strange or lines),
            test=__file__,
        )


def test_the_exceptions_are_needed():
    """A function that no longer differs is held to the letter again."""
    for (one, other), names in FREE.items():
        for name in names:
            assert source(one, name) != source(other, name), f"take {name} off the list"


def test_all_scripts_begin_and_end_alike():
    """T, the number of processes, print0 and what happens on Ctrl-C."""
    beginnings = set()
    ends = set()
    for script in (ddpm, ddim, dit, uvit):
        text = inspect.getsource(script)
        constants, _, _ = text.partition("\n# ---- ")
        _, _, constants = constants.partition("\nSIZE = ")
        beginnings.add(constants.partition("\n")[2])
        ends.add(text.partition("\nif __name__")[2])
    assert len(beginnings) == 1
    assert len(ends) == 1
