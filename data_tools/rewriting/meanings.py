"""Which replacements would still be true of the picture, as far as words alone tell: synonyms, broader words, relations
that do not exclude each other. What is not known to be false is not offered as a negative.
"""

from __future__ import annotations

from functools import lru_cache


def _clusters(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(word.replace("_", " ") for word in line.split()) for line in text.strip().splitlines())


_KINDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "colour": _clusters(
        """red maroon
        green teal turquoise
        blue teal turquoise
        yellow gold golden blonde blond
        orange
        purple
        pink
        brown tan beige
        black
        white
        gray grey silver"""
    ),
    "size": _clusters("large big huge giant enormous\nsmall little tiny"),
    "height": _clusters("tall\nshort"),
    "age of people": _clusters("young teenage\nold elderly adult"),
    "age": _clusters("new modern\nancient antique vintage old"),
    "material": _clusters(
        "wooden wood\nmetal metallic steel iron\nplastic\nstone concrete\nbrick\nleather\nglass\npaper cardboard"
    ),
    "shape": _clusters("round circular oval\nsquare\ntriangular\nrectangular"),
    "opening": _clusters("open\nclosed"),
    "filling": _clusters("empty\nfull crowded busy"),
    "wetness": _clusters("wet\ndry"),
    "cleanness": _clusters("clean neat tidy\ndirty messy muddy dusty cluttered"),
    "weather": _clusters("sunny\ncloudy\nrainy\nfoggy\nsnowy"),
    "ground": _clusters("grassy lush\nsandy\nrocky\nsnowy"),
    "sex": _clusters("male\nfemale"),
    "pattern": _clusters("striped\nspotted\nplaid checkered"),
    "light": _clusters("dark\nbright lit"),
    "mood": _clusters("happy smiling\nsad angry crying"),
    "place": _clusters("indoor\noutdoor"),
    "number": _clusters(
        "two 2\nthree 3\nfour 4\nfive 5\nsix 6\nseven 7\neight 8\nnine 9\nten 10\neleven 11\ntwelve 12"
    ),
}

_PEOPLE = frozenset(
    word
    for line in _clusters(
        """person people human man woman boy girl child kid baby toddler infant lady guy gentleman male female
        adult teenager player surfer skier skateboarder snowboarder rider batter catcher pitcher umpire officer
        policeman police chef cook worker driver biker cyclist motorcyclist fan spectator crowd family couple
        bride groom student teacher soldier friend tourist pedestrian mother father mom dad son daughter brother
        sister individual someone group team dancer farmer fisherman fireman waiter doctor passenger performer
        athlete runner swimmer boarder"""
    )
    for word in line
)
_EXCLUSIVE_PEOPLE = frozenset(
    frozenset(pair)
    for pair in _clusters(
        """man woman
        boy girl
        man girl
        woman boy
        guy woman
        guy girl
        guy lady
        man lady
        boy lady
        gentleman lady
        gentleman woman
        man baby
        woman baby
        father mother
        mom dad
        son daughter
        brother sister
        bride groom"""
    )
)
_SAME = _clusters(
    """couch sofa loveseat
    tv television screen monitor
    bike bicycle cycle
    motorcycle motorbike bike scooter moped
    phone cellphone cell_phone telephone smartphone mobile_phone
    plane airplane aeroplane aircraft jet airliner jetliner
    car vehicle automobile sedan suv taxi cab van
    truck vehicle lorry pickup van trailer
    bus vehicle coach
    train vehicle locomotive engine subway tram trolley
    boat ship vessel sailboat ferry yacht canoe kayak raft vehicle
    street road highway lane avenue roadway intersection
    sidewalk pavement path walkway street
    store shop market
    picture photo photograph image painting
    dog puppy pup pet
    cat kitten kitty pet
    cow bull cattle calf ox
    sheep lamb ram goat
    horse pony foal mare
    table desk counter stand
    chair seat armchair stool recliner bench
    plate dish bowl platter tray saucer
    cup mug glass beverage drink
    hat cap helmet beanie
    shirt t-shirt top blouse sweater jacket clothes
    jacket coat sweater clothes
    pants jeans trousers shorts clothes
    shoe sneaker boot sandal
    glasses glass sunglasses goggles
    ball baseball tennis_ball soccer_ball basketball
    bat baseball_bat
    racket racquet tennis_racket tennis_racquet
    field grass meadow pasture lawn yard park
    hill mountain slope hillside cliff
    ocean sea water beach wave shore lake river
    beach shore sand coast
    snow slope mountain
    forest wood tree
    room kitchen bathroom bedroom living_room office
    bag backpack purse luggage suitcase handbag
    sign stop_sign signal street_sign
    light lamp traffic_light
    computer laptop desktop laptop_computer
    tub bathtub
    window glass
    background sky
    air sky
    vase pot
    street city town
    track railroad rail
    cake pastry
    hot_dog sausage
    drink beverage
    pan pot
    flower plant
    donut doughnut
    food meal dish
    lunch meal food
    dinner meal food
    breakfast meal food
    teddy_bear teddy
    building structure
    house home
    tower building
    skyscraper building"""
)
_BROADER = _clusters(
    """animal dog cat horse cow sheep bird bear elephant zebra giraffe lion tiger monkey goat pig fish duck rabbit
    pet dog cat bird rabbit puppy kitten fish
    animal livestock cattle herd creature butterfly dolphin frog snake turtle puppy kitten insect wildlife
    creature animal insect butterfly fish bird
    livestock cow sheep horse goat pig cattle
    insect butterfly bee ant beetle
    bird duck goose parrot pigeon seagull gull owl swan eagle chicken rooster
    bear teddy_bear panda
    toy teddy_bear doll kite ball
    food pizza sandwich cake bread fruit vegetable meat soup salad pasta rice burger donut hot_dog cookie
    food apple banana orange
    food carrot broccoli tomato potato cheese egg dessert snack pie chicken fish corn
    meal pizza sandwich salad soup pasta
    fruit apple banana orange pear grape lemon strawberry berry peach pineapple cherry
    vegetable broccoli carrot lettuce tomato potato onion pepper corn
    dessert cake pie donut muffin cookie pastry ice_cream
    snack cookie donut sandwich fruit
    drink water juice coffee tea beer wine soda milk
    plant flower tree bush leaf grass
    tree leaf
    flower rose tulip sunflower
    tool hammer saw wrench screwdriver scissors
    instrument guitar piano violin drum trumpet
    furniture table chair couch bed desk bench
    clothing shirt pants jacket hat dress suit tie coat
    clothes shirt pants jacket hat dress suit tie coat
    building house tower skyscraper church store barn restaurant hotel
    house barn
    container box bowl basket cup bottle"""
)
"""Lines of a word and of narrower ones, which exclude each other."""

_SPACE = {
    "left": "to the left of,on the left of,on the left side of",
    "right": "to the right of,on the right of,on the right side of",
    "above": "above,over",
    "on": "on,on top of,atop,upon,onto",
    "below": "below,under,beneath,underneath",
    "near": "next to,beside,near,by,close to,alongside,near to,against",
    "front": "in front of,in the front of",
    "behind": "behind,in back of,in the back of",
    "in": "in,inside,inside of,into,within",
    "out": "outside,outside of,out of",
    "with": "with,along with",
    "without": "without",
    "towards": "toward,towards",
    "away": "away from",
}
_EXCLUDES = {
    "left": "right",
    "right": "left",
    "above": "below",
    "on": "below behind",
    "below": "above on",
    "near": "above below on",
    "front": "behind",
    "behind": "front on",
    "in": "out below behind",
    "out": "in",
    "with": "without",
    "without": "with",
    "towards": "away",
    "away": "towards",
}
_CLASS_OF = {phrase: name for name, phrases in _SPACE.items() for phrase in phrases.split(",")}
_DOING = _clusters(
    """sit rest relax lean lie lay lounge perch squat kneel crouch
    stand wait rest lean pose gather
    walk stroll cross move go hike wander pass travel
    run jog race rush chase play
    ride drive travel mount sit steer
    look watch stare gaze observe see view face glance peer peek
    hold carry grip grasp grab have use lift swing take bring
    wear have dress sport
    eat chew bite munch graze feed enjoy consume taste have
    drink sip
    talk speak chat converse call use hold
    play use enjoy compete perform practice
    hit swing strike serve play bat
    throw toss pitch play
    catch play reach
    jump leap fly perform do
    ski slide ride go race snowboard skate move
    surf ride go
    skateboard ride skate perform do
    fly soar glide float hover
    prepare make cook cut slice fix
    cut slice chop
    pull drag tow carry haul
    push move shove
    lie lay sleep rest nap
    smile laugh grin pose
    hang swing dangle suspend
    park stop sit stand
    cover fill top decorate
    fill load cover
    surround cover fill
    feed give pet
    wash clean brush
    touch pet hold kiss hug lick"""
)


@lru_cache(maxsize=1)
def _attribute_places() -> dict[str, tuple[tuple[str, int], ...]]:
    places: dict[str, list[tuple[str, int]]] = {}
    for kind, clusters in _KINDS.items():
        for number, cluster in enumerate(clusters):
            for word in cluster:
                places.setdefault(word, []).append((kind, number))
    return {word: tuple(found) for word, found in places.items()}


def attribute_kinds(word: str) -> tuple[str, ...]:
    """Kinds of a word's meanings (``colour``, ``size``, ...); empty if it is not listed."""
    return tuple(kind for kind, _ in _attribute_places().get(word, ()))


def excludes_attribute(one: str, other: str) -> bool:
    """Whether something that is ``one`` cannot be ``other``: both of one kind, and nowhere of equal meaning."""
    mine, theirs = _attribute_places().get(one, ()), _attribute_places().get(other, ())
    share_kind = {kind for kind, _ in mine} & {kind for kind, _ in theirs}
    return bool(share_kind) and not set(mine) & set(theirs)


@lru_cache(maxsize=1)
def _noun_sets() -> dict[str, frozenset[int]]:
    found: dict[str, set[int]] = {}
    pairs = [(line[0], word) for line in _BROADER for word in line[1:]]
    for number, cluster in enumerate((*_SAME, *pairs)):
        for word in cluster:
            found.setdefault(word, set()).add(number)
    return {word: frozenset(numbers) for word, numbers in found.items()}


def _sets_of(*words: str) -> frozenset[int]:
    return frozenset().union(*(_noun_sets().get(word, frozenset()) for word in words))


@lru_cache(maxsize=1 << 18)
def may_be_same(one: str, other: str) -> bool:
    """Whether a picture that shows ``one`` may be said to show ``other``: equal, synonyms, or one broader."""
    if one == other:
        return True
    last, its = one.rpartition(" ")[2], other.rpartition(" ")[2]
    if last == its or last.endswith(its) or its.endswith(last):
        return True
    if _sets_of(one, last) & _sets_of(other, its):
        return True
    return last in _PEOPLE and its in _PEOPLE and frozenset((last, its)) not in _EXCLUSIVE_PEOPLE


def contradicting_prepositions(phrase: str) -> frozenset[str]:
    """Prepositions that cannot hold where ``phrase`` does; empty where that is not known."""
    names = _EXCLUDES.get(_CLASS_OF.get(phrase, ""), "").split()
    return frozenset(other for name in names for other in _SPACE[name].split(","))


@lru_cache(maxsize=1)
def _verb_sets() -> dict[str, frozenset[int]]:
    found: dict[str, set[int]] = {}
    for number, cluster in enumerate(_DOING):
        for word in cluster:
            found.setdefault(word, set()).add(number)
    return {word: frozenset(numbers) for word, numbers in found.items()}


@lru_cache(maxsize=1 << 16)
def may_be_doing(one: str, other: str) -> bool:
    """Whether somebody who does ``one`` may be said to do ``other`` (base forms, with prepositions or without)."""
    verb, its = one.partition(" ")[0], other.partition(" ")[0]
    return verb == its or bool(_verb_sets().get(verb, frozenset()) & _verb_sets().get(its, frozenset()))
