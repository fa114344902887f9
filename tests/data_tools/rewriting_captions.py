"""Captions written for these tests, in the manner of COCO and Visual Genome, and a store of any texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_tools.demo_tokenizer import train_wordpieces
from vlscale.data.store_writer import ImageWriter, TextWriter

CAPTIONS = """
A man riding a wave on top of a surfboard.
A black and white cat is sitting on a wooden bench next to an old red umbrella.
Two young children playing with a frisbee in a grassy field.
A group of people standing around a kitchen preparing food.
The bus is red and white.
A woman holds an umbrella while walking down the street.
Several zebras graze in an open field near some trees.
A plate of food with broccoli, rice and chicken on a table.
A dog without a collar is running on the beach.
A close up of a slice of pizza on a white plate.
A baseball player swings his bat at a ball during a game.
People are walking across a busy city street.
A train traveling down tracks next to a building.
A man's hat is on the chair
there is an apple to the left of a dog and next to a bear
a cat, a bird and an ear of corn
A parked car covered in snow.
Three sheep stand in the grass.
A fire hydrant in front of a brick building.
A living room with a couch, coffee table and a television.
A bathroom with a toilet and sink
A man wearing a suit and tie talks on a cell phone
a clock tower with a sky background
The man in the blue shirt is about to hit a tennis ball.
An orange cat sleeps on a laptop computer.
Teddy bears sitting on a bed
A little girl eats a large slice of chocolate cake.
An elderly woman feeding pigeons in the park.
A giraffe standing behind a wooden fence.
Two elephants walk under a tall tree.
An airplane flying over a snowy mountain.
A hungry boy is eating an apple.
A brown horse pulls a small cart.
An empty bench beside the lake.
A kitten sleeping inside a cardboard box.
Four boats are on the water.
A skier jumps over a fence.
A blue bicycle leaning against a brick wall.
A yellow taxi drives down a wet road.
A waiter carrying a tray of drinks.
A boy in a green shirt throws a ball to a dog.
An umbrella above a table outside a restaurant.
A white bird sitting on an elephant.
Five oranges in a glass bowl.
A young woman brushes her teeth in front of a mirror.
A tall clock stands between two old houses.
The dog is under the table.
A surfer carries his board along the beach.
A pair of scissors next to a ruler.
A man and woman ride bikes through the city.
An open suitcase full of clothes.
A striped tie hanging in a closet.
A sandwich and an egg on a plate
A large truck parked behind a small house.
A snowboarder slides down the hill.
Six cows eat grass near a barn.
A chef cuts vegetables in a kitchen.
An ox pulls an old plow.
Some children fly kites at the beach
A clean kitchen with a stainless steel oven
A motorcycle is parked on the sidewalk.
A hat on top of an iron chair
An hour glass next to a university sign
A tiny bird perched on a branch
""".strip().splitlines()


def write_texts(root: Path, captions: list[tuple[str, str | None]], keep_tokenizer: bool = True) -> None:
    """Write ``ROOT/images`` (one small region each) and ``ROOT/texts`` of (caption, image id)."""
    pieces = train_wordpieces([text for text, _ in captions] or ["a"])
    ids = list(dict.fromkeys(image for _, image in captions if image is not None))
    with ImageWriter(root, 4, codec="none") as images:
        for name in ids:
            images.write(name, 10, 10, np.ones((1, 4), np.float16), [[0, 0, 1, 1]])
    with TextWriter(root, pieces.vocabulary, images.rows, pieces.json if keep_tokenizer else None) as texts:
        for number, ((text, image), (pieces_of, _)) in enumerate(
            zip(captions, pieces.encode([text for text, _ in captions]), strict=True)
        ):
            texts.write(f"t{number}", text, pieces_of, [] if image is None else [image])
