"""The main job on two small trained models: `python -m nnatomy.demo`."""
