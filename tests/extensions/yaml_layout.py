"""A layout: one YAML file of positions beside each video."""

import yaml

from tracknet.data.labels import BallLabel, Visibility
from tracknet.data.layouts import LAYOUTS
from tracknet.data.layouts.reading import make_clip, open_video, visible_files
from tracknet.errors import UserError


class YamlLayout:
    EXPECTED = "<clip>.yaml beside <clip>.mp4"
    PREFIX = "clip"
    OPTIONS = ()

    def list_games(self, root):
        return [path.stem for path in visible_files(root, "*.yaml")]

    def published_splits(self, root, games):
        return {}

    def read_game(self, root, game):
        path = root / f"{game}.yaml"
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(rows, dict):
            raise UserError(f"{path}: expected frame: [x, y], or frame: null without a ball.")
        labels = {
            frame: BallLabel(Visibility.EASY, tuple(xy)) if xy else BallLabel(Visibility.ABSENT, None)
            for frame, xy in rows.items()
        }
        return [make_clip(game, game, open_video(root / f"{game}.mp4"), labels, path)]


LAYOUTS.register("yaml", YamlLayout())
