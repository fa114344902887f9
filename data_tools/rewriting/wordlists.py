"""Words of captions that a dictionary cannot classify: function words, and how ambiguous ones are mostly meant."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _phrases(text: str) -> tuple[tuple[str, ...], ...]:
    """Phrases separated by commas, the longest first."""
    return tuple(sorted((tuple(phrase.split()) for phrase in text.split(",")), key=len, reverse=True))


SINGULAR_DETERMINERS = _words("a an another each every one either neither")
DEFINITE_DETERMINERS = _words("the this that his her its their my our your whose")
COUNTING_DETERMINERS = _words("these those several many few both multiple various numerous couple")
OPEN_DETERMINERS = _words("some any no all more most much enough other such what which")
DETERMINERS = SINGULAR_DETERMINERS | DEFINITE_DETERMINERS | COUNTING_DETERMINERS | OPEN_DETERMINERS

NUMBERS = _words("two three four five six seven eight nine ten eleven twelve")
POSSESSIVES = ("'s", "\u2019s")

AUXILIARIES = _words(
    "is are was were be been being am has have had having do does did can could will would may might must shall should "
    "isn't aren't wasn't weren't doesn't don't didn't can't it's he's she's they're there's that's gets getting got"
)
PRONOUNS = _words(
    "i you he she it we they him them us me himself herself itself themselves there here who whom something someone "
    "everything everyone nothing somebody anyone others"
)
CONJUNCTIONS = _words("and or but while as with-and because so if when where than that's & nor yet although though")
NEGATIONS = _words(
    "not n't never no without isn't aren't wasn't weren't doesn't don't didn't can't neither nor nothing"
)
ADVERBS = _words(
    "very just also too only still even almost partially fully together away back apart ahead nearby indoors outdoors "
    "quite really upside sideways forward forwards backward backwards upward downward alone else then now again "
    "already currently about ready home here there side-by-side"
)
PARTICLES = _words("up down off out away back over around together along")

PREPOSITIONS = _words(
    "on in at with of by from to into onto for near above over below under beneath underneath behind beside besides "
    "between inside outside through across along around against among amongst towards toward past without during up "
    "down off upon within beyond after before like atop alongside amid amidst opposite via per out about"
)
LONG_PREPOSITIONS = _phrases(
    "to the left of,to the right of,on the left of,on the right of,on the left side of,"
    "on the right side of,to the side of,on the side of,at the side of,in front of,in the front of,"
    "at the front of,in back of,in the back of,on the back of,at the back of,on top of,at the top of,"
    "on the top of,at the bottom of,next to,close to,in between,along with,inside of,outside of,"
    "away from,out of,off of,across from,in the middle of,in the center of,in the corner of,"
    "on the edge of,at the edge of,near to,far from,up to,down to,up in,up on,out on,out in,down on,"
    "in the background of,on the other side of,by the side of,at the end of,on the end of"
)

VIEWS = _words(
    "photo photos picture pictures image images photograph view shot close-up closeup snapshot drawing painting sketch "
    "scene selfie portrait display variety kind type style front side back top"
)
"""Nouns that, before "of", do not name a thing of the scene."""

PICTURES = _words(
    "photo picture image photograph shot view scene closeup close-up snapshot selfie background foreground"
)
"""What a caption says of itself: never replaced."""

QUANTITIES = _words(
    "group groups bunch pair couple set pile piles row rows lot lots number crowd herd flock piece pieces slice slices "
    "collection line stack stacks dozen dozens hundreds part team pack family bit amount assortment array"
)

PLURAL_ONLY = _words(
    "people police clothes pants jeans scissors shorts sunglasses goggles tongs trousers tights pajamas overalls "
    "headphones binoculars pliers cattle stairs bleachers groceries goods surroundings condiments belongings"
)
INVARIANT = _words("sheep deer fish aircraft elk moose bison salmon trout offspring shrimp series species dice")

ING_NOUNS = _words(
    "building buildings painting paintings ceiling ceilings clothing railing railings crossing crossings king ring "
    "rings string wing wings swing swings thing things wedding evening morning topping toppings frosting icing "
    "seasoning stuffing pudding dressing siding awning flooring lighting parking lightning dining living landing "
    "meeting bedding opening housing covering greeting spring sling ping wiring setting clearing dumpling duckling "
    "duckling sapling earring earrings"
)
"""Words in -ing that are mostly nouns in captions; "parking lot", "dining table" and "living room" are compounds."""

ADJECTIVES = _words(
    "red green blue yellow orange purple pink brown black white gray grey tan beige gold golden silver maroon teal "
    "turquoise colorful colourful multicolored multi-colored dark light bright pale blonde blond large big huge giant "
    "enormous small little tiny medium tall short long wide narrow thick thin fat skinny old young elderly new modern "
    "antique vintage ancient adult teenage wooden metal metallic plastic brick stone leather glass concrete round "
    "square rectangular circular oval open closed empty full wet dry clean dirty hot cold warm cool frozen fresh ripe "
    "raw cooked fried grilled baked striped spotted plaid checkered fluffy furry hairy bald bare barefoot shirtless "
    "naked sunny cloudy snowy rainy foggy grassy sandy rocky muddy dusty busy crowded quiet happy sad angry smiling "
    "beautiful pretty nice cute lovely ugly handsome male female asian american chinese japanese different same "
    "similar single double various several whole half low high left right front rear upper lower middle top bottom "
    "main public outdoor indoor urban rural wild domestic stuffed electric electronic digital professional military "
    "sliced chopped shiny sharp flat steep deep shallow heavy calm rough rusty broken parked covered decorated "
    "delicious tasty healthy fancy simple plain cluttered messy neat tidy lush leafy lit alone asleep ready visible"
)
"""Words that mean an adjective before a noun, also where a dictionary knows them as nouns or verbs."""

VERBS = _words(
    "sit stand walk ride hold run jump play eat drink look watch wear carry fly lie lay lean sleep swim surf ski "
    "skate skateboard snowboard throw catch hit kick swing pull push pose smile talk read write cook cut drive travel "
    "move rest wait hang graze feed drag chase climb cross reach prepare use work fill cover show sing dance drop "
    "fall float go come get make take put give try turn pass enter leave touch pet hug kiss brush wash clean open "
    "close serve share gather race perform grab point stare gaze face approach follow lick bite chew sniff dig roll "
    "slide wave laugh cry paint draw build land sail row paddle kneel crouch bend squat perch peek peer relax "
    "exercise practice compete"
)
"""Verbs that captions use; other words that a dictionary knows as noun and verb are taken for nouns."""

IRREGULAR_PARTICIPLES = _words(
    "seen shown made taken held worn eaten driven ridden written thrown drawn built cut put set"
)
LIGHT_VERBS = _words(
    "have be do get use show appear seem look try take make go come enjoy wait pose contain include fill let see give "
    "keep start begin prepare face want need like feature depict turn move travel work live"
)
"""Too weak a meaning to make a caption false."""
