"""Define the page's colours, fonts and spacing. Fonts are the system's: the browser loads none."""

from gradio.themes import Base
from gradio.themes.utils import colors, sizes

AMBER = colors.Color(
    name="amber",
    c50="#fff8eb",
    c100="#ffedc7",
    c200="#ffdb8f",
    c300="#ffc24d",
    c400="#ffab1f",
    c500="#f59407",
    c600="#c97000",
    c700="#9a5200",
    c800="#7c4106",
    c900="#67360a",
    c950="#3b1b00",
)
"""Conditions are amber everywhere in this project, from contact sheets to the timeline."""

_SANS = (
    "ui-sans-serif",
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "Noto Sans",
    "Noto Sans CJK SC",
    "sans-serif",
)
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> Base:
    """Build the theme for light and dark pages."""
    base = Base(
        primary_hue=AMBER,
        secondary_hue=AMBER,
        neutral_hue=colors.stone,
        spacing_size=sizes.spacing_md,
        radius_size=sizes.radius_lg,
        text_size=sizes.text_md,
        font=_SANS,
        font_mono=_MONO,
    )
    return base.set(
        body_background_fill="#f6f5f3",
        body_background_fill_dark="#131211",
        body_text_color="#1c1a18",
        body_text_color_dark="#edeae6",
        body_text_color_subdued="#625d57",
        body_text_color_subdued_dark="#a8a29b",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#1d1b19",
        background_fill_secondary="#f6f5f3",
        background_fill_secondary_dark="#131211",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1d1b19",
        block_border_width="0px",
        block_shadow="none",
        block_label_text_color="#1c1a18",
        block_label_text_color_dark="#edeae6",
        block_label_text_weight="600",
        block_title_text_color="#1c1a18",
        block_title_text_color_dark="#edeae6",
        block_title_text_weight="600",
        block_info_text_color="#625d57",
        block_info_text_color_dark="#a8a29b",
        border_color_primary="#e2deda",
        border_color_primary_dark="#35312d",
        border_color_accent="#c97000",
        border_color_accent_dark="#ffab1f",
        input_background_fill="#ffffff",
        input_background_fill_dark="#141312",
        input_border_color="#cfc9c3",
        input_border_color_dark="#46413b",
        input_border_color_focus="#c97000",
        input_border_color_focus_dark="#ffab1f",
        input_placeholder_color="#7b756e",
        input_placeholder_color_dark="#8d8780",
        input_border_width="1px",
        input_shadow="none",
        input_shadow_focus="0 0 0 3px rgba(245, 148, 7, 0.25)",
        button_primary_background_fill="#ffab1f",
        button_primary_background_fill_dark="#ffab1f",
        button_primary_background_fill_hover="#ffc24d",
        button_primary_background_fill_hover_dark="#ffc24d",
        button_primary_text_color="#2a1500",
        button_primary_text_color_dark="#2a1500",
        button_primary_border_color="#ffab1f",
        button_primary_border_color_dark="#ffab1f",
        slider_color="#e08600",
        slider_color_dark="#ffab1f",
        checkbox_background_color_selected="#c97000",
        checkbox_background_color_selected_dark="#ffab1f",
        loader_color="#c97000",
        link_text_color="#9a5200",
        link_text_color_dark="#ffc24d",
    )
