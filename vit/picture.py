"""The demo's picture: test images, what the model says they are, and where its CLS token looks."""

import torch

__all__ = ["cls_attention", "draw"]

RIGHT, WRONG, GREY = "#1a7f37", "#cf222e", "#57606a"


@torch.no_grad()
def cls_attention(vit, images):
    """How much of the CLS token comes from each patch, (b, patches), each row summing to 1.

    Attention rollout of Abnar and Zuidema 2020: behind each block a token is half itself, by the residual connection,
    and half what it attended to, averaged over the heads; the product over the blocks tells what the last CLS token is
    made of. The maps are read by hooks on `attend` of the plain blocks: fused ones never make them, and step aside for
    the hook.
    """
    maps = []
    attends = [attention.fn.attend for attention, _ in vit.transformer.layers]
    hooks = [attend.register_forward_hook(lambda module, args, out: maps.append(out.mean(dim=1))) for attend in attends]
    try:
        vit(images)
    finally:
        for hook in hooks:
            hook.remove()
    identity = rollout = torch.eye(maps[0].shape[-1], device=images.device)
    for attention in maps:
        rollout = (attention + identity) / 2 @ rollout
    from_patches = rollout[:, 0, 1:]
    return from_patches / from_patches.sum(dim=-1, keepdim=True)


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
