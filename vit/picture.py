"""Pictures of attention: the demo's, of many small images, and `vitriton look`'s, of one photograph and many maps."""

import textwrap

__all__ = ["draw", "draw_panels"]

RIGHT, WRONG, GREY = "#1a7f37", "#cf222e", "#57606a"


def draw(path, images, maps, captions, *, title, subtitle, columns=8):
    """Write a picture of images (b, height, width) in [0, 1], 1 being ink, each above itself tinted by its map.

    maps (b, rows, cols) hold shares that sum to 1; captions are (text, whether the model is right).
    """
    # no pyplot: it has state, and may look for a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    images, maps = images.cpu().numpy(), maps.cpu().numpy()
    height, width = images.shape[1:]
    tint = LinearSegmentedColormap.from_list("tint", [(1, 0.4, 0, 0), (1, 0.4, 0, 0.9)])
    shares = Normalize(maps.min(), maps.max())
    bands = -(-len(images) // columns)

    figure = Figure(figsize=(1.25 * columns, 2.85 * bands + 1.2), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    below_title = 1 - 0.65 / figure.get_figheight()
    # bands of an image row and a tinted row, with air for the captions between the bands
    outer = figure.add_gridspec(bands, 1, left=0.02, right=0.98, top=below_title - 0.04, bottom=0.1, hspace=0.2)
    for band in range(bands):
        inner = outer[band].subgridspec(2, columns, hspace=0.06, wspace=0.12)
        for column in range(columns):
            i = band * columns + column
            if i >= len(images):
                continue
            text, right = captions[i]
            for row in range(2):
                axes = figure.add_subplot(inner[row, column], xticks=[], yticks=[])
                axes.imshow(images[i], cmap="gray_r", vmin=0, vmax=1 if row == 0 else 2)
                if row == 0:
                    axes.set_title(text, fontsize=9, color=RIGHT if right else WRONG, pad=3)
                else:
                    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
                    axes.imshow(maps[i], cmap=tint, norm=shares, extent=extent, interpolation="nearest")
                for spine in axes.spines.values():
                    spine.set_color("#d0d7de" if right else WRONG)
    figure.text(0.02, 1 - 0.15 / figure.get_figheight(), title, fontsize=13, weight="bold", va="top")
    figure.text(0.02, 1 - 0.48 / figure.get_figheight(), subtitle, fontsize=9, color=GREY, va="top")
    bar = figure.colorbar(
        ScalarMappable(shares, tint), cax=figure.add_axes((0.3, 0.055, 0.4, 0.018)), orientation="horizontal"
    )
    bar.ax.tick_params(labelsize=7, colors=GREY)
    bar.ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
    bar.set_label("how much of the CLS token comes from this patch", fontsize=8, color=GREY)
    figure.savefig(path)


def draw_panels(path, photo, panels, *, title, text="", columns=None):
    """Write a picture of `photo` (height, width, 3) in [0, 1] and, beside it, of each panel's map over it.

    panels: (map (rows, cols), title, remark) each, maps being at least 0 and not all 0. They follow the photo, row by
    row; with `columns`, the photo has a column of its own, and each row so many panels. `text` stands below the title,
    its lines wrapped. A map shows clear what is at most its average, and has a scale of its own up to its largest.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    height, width = photo.shape[:2]
    if columns is None:
        columns = columns_for(len(panels) + 1)
        places = [divmod(i + 1, columns) for i in range(len(panels))]
    else:
        places = [(i // columns, i % columns + 1) for i in range(len(panels))]
        columns += 1
    bands = places[-1][0] + 1

    # all in inches
    wide = min(2.4, 14 / columns)
    tall, gap, label, margin, foot = wide * height / width, 0.12, 0.45, 0.2, 0.62
    page = max(columns * (wide + gap) - gap, 6) + 2 * margin
    letters = int(15 * (page - 2 * margin))
    lines = [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, letters)]
    head = 0.52 + 0.165 * len(lines)
    page = page, head + bands * (tall + label) + foot
    figure = Figure(figsize=page, dpi=150, facecolor="white")
    FigureCanvasAgg(figure)

    def box(left, top, width, height):
        return left / page[0], 1 - (top + height) / page[1], width / page[0], height / page[1]

    def panel(place, name, remark):
        """Axes, with a title over them, and over the photo in grey if they are not the photo's own."""
        left, top = margin + place[1] * (wide + gap), head + label + place[0] * (tall + label)
        axes = figure.add_axes(box(left, top, wide, tall), xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(False)
        small = min(1, wide / 2.4)
        for above, words, size, style in ((0.21, name, 9.5, {"weight": "bold"}), (0.05, remark, 7.5, {"color": GREY})):
            axes.text(0, 1 + above / tall, words, fontsize=size * small, va="bottom", transform=axes.transAxes, **style)
        return axes

    few = height < 64  # pixels, and the image is shown as the squares that they are
    panel((0, 0), "the image", "the part that the model sees").imshow(
        photo, interpolation="nearest" if few else "antialiased"
    )
    grey = photo.mean(axis=2)
    grey = 0.35 + 0.5 * (grey - grey.min()) / max(grey.max() - grey.min(), 1e-6)
    heat, extent = heat_map(), (-0.5, width - 0.5, height - 0.5, -0.5)
    for (map, name, remark), place in zip(panels, places, strict=True):
        axes, map = panel(place, name, remark), (map / map.mean()).cpu().numpy()
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest" if few else "antialiased")
        scale = Normalize(1, max(2, map.max()))
        axes.imshow(map, cmap=heat, norm=scale, extent=extent, interpolation="nearest" if few else "catrom")

    left = margin / page[0]
    figure.text(left, 1 - 0.16 / page[1], title, fontsize=13, weight="bold", va="top")
    figure.text(left, 1 - 0.47 / page[1], "\n".join(lines), fontsize=8.5, color=GREY, va="top", linespacing=1.35)
    axes = figure.add_axes(box(margin, page[1] - 0.46, 2.9, 0.1))
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), heat), cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.set_ticks([0, 1], labels=["the map's average, or less", "its largest (or 2x)"])
    axes.tick_params(labelsize=7, colors=GREY, length=0)
    for words, where in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
        words.set_horizontalalignment(where)
    figure.savefig(path)


def columns_for(cells):
    """How many columns so many cells are set in: one row if it is short, else with few places left empty."""
    return cells if cells <= 5 else min((5, 4, 6), key=lambda columns: -cells % columns)


def heat_map():
    """The colours of attention: clear where there is none, so that the photograph shows, to a light yellow."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    share = [i / 255 for i in range(256)]
    colours = colormaps["inferno"]([0.25 + 0.72 * x for x in share])
    colours[:, 3] = [min(0.9, 1.4 * x) for x in share]
    return ListedColormap(colours)
