"""What is set on pages, and what stays as it is."""

import xml.etree.ElementTree as ET

import pytest

from samlib.site.typography import typeset


@pytest.mark.parametrize(
    ("written", "printed"),
    [
        ("u = -0.116 (-1, +2)", "u = −0.116 (−1, +2)"),
        ("ηλ_gen/2 and K_tr ≤ K", "ηλ<sub>gen</sub>/2 and K<sub>tr</sub> ≤ K"),
        ("‖H‖_F of i^-0.5", "‖H‖<sub>F</sub> of i<sup>−0.5</sup>"),
        ("¼‖H‖²_F", "¼‖H‖²<sub>F</sub>"),
        ("scales i^−½", "scales i<sup>−½</sup>"),
        ("2026-11-29, 2404-19261, pages 3-4, a-1, --jobs, x_max, λ_maximum", None),
        ("Agarwala and Pennington, CIFAR-10, GELU-2", None),
    ],
)
def test_text_is_set(written, printed):
    assert typeset(f"<p>{written}</p>") == f"<p>{printed or written}</p>"


@pytest.mark.parametrize(
    "kept",
    [
        "<code>λ_max = -1</code>",
        "<pre><span>λ_max</span> = <span>-1</span></pre>",
        r'<span class="math notranslate nohighlight">\(λ_max^2 = -1\)</span>',
        r'<div class="math notranslate"> \[x^2 - -1\] </div>',
        "<script>const x = -1</script>",
        '<img alt="λ_max is -1" src="a-1.png">',
        "<svg><title>λ_max is -1</title></svg>",
    ],
)
def test_code_mathematics_and_attributes_are_kept(kept):
    page = f"<p>before {kept} after</p>"
    assert typeset(page) == page
    assert typeset(f"<p>u = -1 {kept} λ_max</p>") == f"<p>u = −1 {kept} λ<sub>max</sub></p>"


def test_letters_of_a_drawing_are_moved_and_moved_back():
    drawing = '<svg><text x="-1">φηλ_gen/2 at i^-1</text><g transform="rotate(-90)"/></svg>'
    tree = ET.fromstring(typeset(f"<p>{drawing}</p>"))
    text = tree.find("svg/text")
    assert "".join(text.itertext()).replace("\u200b", "") == "φηλgen/2 at i−1"
    size = {"font-size: 75%": 0.75, None: 1.0}
    shifts = [float(part.get("dy").removesuffix("em")) * size[part.get("style")] for part in text]
    assert sum(shifts) == pytest.approx(0)
    assert shifts[0] > 0 > shifts[2]
    assert tree.find("svg/g").get("transform") == "rotate(-90)"
