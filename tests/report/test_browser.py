"""The page in headless Chromium: `make test-browser`, where there is none."""

import io
import shutil

import pytest
from PIL import Image

from tests.report import pages

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: make test-browser")
A4, A4_TURNED = {"width": 687, "height": 1017}, 1017  # CSS pixels between margins of 14 mm
NUMBERS = [f"method {place}" for place in (2, 0, 6, 4, 3, 7, 8, 9, 5, 1)]  # by the change


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    pages.write(path)
    return path


@pytest.fixture
def open_page(browser, path):
    """Opens the page; at the end it had no error and had asked for nothing but itself."""
    seen, requests, contexts = [], [], []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(10_000)
        page = contexts[-1].new_page()
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("dialog", lambda dialog: seen.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url.partition(",")[0]))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert seen == []
    assert set(requests) <= {path.as_uri(), "data:image/png;base64"}


def pixel(page, selector, across, down=0.1):
    """What is seen at a place of an element."""
    image = Image.open(io.BytesIO(page.locator(selector).first.screenshot())).convert("L")
    return image.getpixel((int(across * image.width), int(down * image.height)))


def first_column(page):
    return page.locator("table").first.locator("tbody tr:visible td:first-child").all_inner_texts()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_images_are_shown_and_what_could_be_a_script_is_text(open_page, scheme):
    page = open_page(color_scheme=scheme)
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert page.locator("img").count() == 4
    assert page.title() == page.locator("h1").inner_text() == pages.EVIL
    assert page.locator("tbody td").filter(has_text=pages.EVIL).count() == 1
    # Text stands out from its ground by WCAG's contrast, and a plot lies on paper.
    for selector, least in (("h1", 7), ("figcaption", 4.5), ("nav a", 4.5), ("th button", 4.5), ("pre", 7)):
        assert contrast(page, selector) >= least
    assert pixel(page, "img.plot", 0.01, 0.02) > 200
    assert (pixel(page, "main", 0.01, 0.001) > 128) == (scheme == "light")


def contrast(page, selector):
    """Of an element's text to the ground of the page."""
    colors = page.evaluate(
        """(selector) => [document.querySelector(selector), document.body].map((element, ground) => {
            const style = getComputedStyle(element);
            return (ground ? style.backgroundColor : style.color).match(/[\\d.]+/g).slice(0, 3).map(Number);
        })""",
        selector,
    )
    luminance = []
    for color in colors:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (own / 255 for own in color)]
        luminance.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(luminance) / min(luminance)


def test_slider_by_mouse_and_by_keyboard(open_page):
    page = open_page()
    slider, left, right = page.locator("input[type=range]"), 0.27, 0.73

    def seen():
        return [pixel(page, ".sides", place, 0.3) for place in (left, right)]

    assert seen() == [0, 255]
    box = slider.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.click(box["x"] + 0.9 * box["width"], middle)
    assert abs(int(slider.input_value()) - 90) <= 1
    assert seen() == [0, 0]
    page.mouse.move(box["x"] + 0.9 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.1 * box["width"], middle, steps=3)
    page.mouse.up()
    assert abs(int(slider.input_value()) - 10) <= 1
    assert seen() == [255, 255]
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert slider.input_value() == "99"
    assert seen() == [0, 0]
    page.keyboard.press("Home")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "3"
    assert seen() == [255, 255]


def test_columns_sort_by_click_and_by_key(open_page):
    page = open_page()
    table = page.locator("table").first
    as_written = first_column(page)

    def sort(name, key=""):
        button = table.get_by_role("button", name=name, exact=True)
        button.press(key) if key else button.click()
        column = table.get_by_role("columnheader", name=name, exact=True)
        assert table.locator("th:not([aria-sort=none])").count() == (column.get_attribute("aria-sort") != "none")
        return column.get_attribute("aria-sort"), first_column(page)

    assert sort("change [%]") == ("ascending", NUMBERS)
    assert sort("change [%]", "Enter") == ("descending", NUMBERS[::-1])
    assert sort("change [%]", "Space") == ("none", as_written)
    rising, without = [f"method {place}" for place in (4, 0, 3, 2, 7, 8, 9, 6)], ["method 1", "method 5"]
    assert sort("p", "Space")[1] == rising + without
    assert sort("p")[1] == rising[::-1] + without
    assert sort("parameters")[1][-1] == "method 2"
    assert sort("kind")[1] == [f"method {place}" for place in (5, 6, 4, 7, 8, 9, 0, 3, 1, 2)]


def test_rows_are_filtered_by_words(open_page):
    page = open_page()
    (field,) = page.get_by_role("searchbox").all()
    field.fill("LOW rank")
    assert first_column(page) == ["method 0", "method 3"]
    assert page.locator("output").inner_text() == "2 of 10 rows"
    page.locator("table").first.get_by_role("button", name="change [%]").dblclick()
    assert first_column(page) == ["method 3", "method 0"]
    field.fill("")
    assert len(first_column(page)) == 10


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_paper_nothing_is_cut_and_grids_lie_side_by_side(open_page, scheme):
    page = open_page(viewport=A4, color_scheme=scheme)
    page.emulate_media(media="print", color_scheme=scheme)
    wide = page.locator(".wide")
    wide.evaluate("(element) => { element.hidden = true }")
    assert cut(page) == []
    wide.evaluate("(element) => { element.hidden = false }")
    page.set_viewport_size({"width": A4_TURNED, "height": 700})
    assert cut(page) == []
    page.set_viewport_size(A4)
    side_by_side(page)
    assert contrast(page, "h1") >= 7
    for hidden in ("nav", ".filter", "input[type=range]"):
        assert not page.locator(hidden).first.is_visible()
    for whole in ("tbody tr", "figure"):
        assert page.locator(whole).first.evaluate("(e) => getComputedStyle(e).breakInside") == "avoid"
    assert page.pdf(format="A4").startswith(b"%PDF")


def cut(page):
    """The elements whose content is wider than they are, or that are wider than the page."""
    return page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((element) =>
            element.clientWidth && element.scrollWidth > element.clientWidth + 1
            || element.getBoundingClientRect().right > innerWidth + 1
        ).map((element) => element.outerHTML.slice(0, 80))"""
    )


def side_by_side(page):
    before, after = (image.bounding_box() for image in page.locator(".comparison img").all())
    assert before["x"] + before["width"] <= after["x"]
    assert before["y"] == after["y"]
    assert [pixel(page, f".comparison .side:nth-child({place}) img", 0.45) for place in (1, 2)] == [0, 255]


def test_without_a_script_it_holds_the_same(open_page):
    page = open_page(java_script_enabled=False)
    side_by_side(page)
    assert len(first_column(page)) == 10
    assert not page.locator(".filter").is_visible()


def test_on_a_phone_the_page_is_no_wider_than_the_screen(open_page):
    page = open_page(viewport={"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("figure.comparison img").first.bounding_box()["width"] > 300
