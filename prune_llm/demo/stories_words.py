"""The words the stories are made of: plain data, no choices and no sentences of the plots.

Everything is a tuple, so the order is part of the data: changing a line changes the stories.
"""

from __future__ import annotations

from typing import NamedTuple

SHE_NAMES = (
    "Mia", "Anna", "Lily", "Rosa", "Emma", "Nora", "Ruby", "Clara", "Zoe", "Ella", "Ivy", "Tara",
    "Lucy", "Hazel", "Maya", "Olive",
)  # fmt: skip
HE_NAMES = (
    "Tom", "Ben", "Max", "Leo", "Sam", "Oscar", "Finn", "Hugo", "Jack", "Noah", "Peter", "Otto",
    "Theo", "Adam", "Felix", "Simon",
)  # fmt: skip
ANIMALS = (
    "fox", "rabbit", "bear", "mouse", "owl", "otter", "hedgehog", "squirrel", "badger", "frog",
    "duck", "cat", "dog", "goat", "turtle", "beaver",
)  # fmt: skip
SHE_ELDERS = ("Grandma Pearl", "Aunt Rita", "Mrs. Hill", "Mrs. Baker", "Old Martha", "Queen Vera")
HE_ELDERS = ("Grandpa Joe", "Uncle Bob", "Mr. Stone", "Mr. Miller", "Old Walter", "King Edmund")


class Trait(NamedTuple):
    """A quality of a character and what it looks like when it matters."""

    word: str
    deed: str  # past tense, completes "{name} ..."


TRAITS = (
    Trait("brave", "took a deep breath and did not run away"),
    Trait("clever", "sat down and thought of a plan"),
    Trait("patient", "waited and tried again and again"),
    Trait("kind", "thought of the others first"),
    Trait("careful", "looked twice before every step"),
    Trait("cheerful", "sang a song to stay happy"),
    Trait("curious", "asked many questions about it"),
    Trait("quiet", "listened and noticed every small thing"),
    Trait("strong", "pushed and pulled with both arms"),
    Trait("honest", "said exactly what was true"),
    Trait("gentle", "spoke in a soft voice"),
    Trait("stubborn", "would not give up"),
    Trait("quick", "ran as fast as the wind"),
    Trait("proud", "wanted to show that it could be done"),
)

VILLAGES = (
    "Oakhill", "Riverton", "Greenfield", "Stonebridge", "Millbrook", "Foxwood", "Lakeside",
    "Sandy Bay", "Windy Hill", "Maple Town",
)  # fmt: skip


class Place(NamedTuple):
    """Somewhere to go: what follows "in/at", where things hide there, what there is to see."""

    where: str  # "in the forest"
    noun: str  # "the forest"
    spots: tuple[str, ...]
    sights: tuple[str, ...]


PLACES = (
    Place("in the forest", "the forest",
          ("under a fallen log", "behind an old oak", "in a heap of leaves", "between two roots"),
          ("tall pine trees", "a deer with her fawn", "mushrooms in a ring")),
    Place("at the beach", "the beach",
          ("behind a sand dune", "under a broken boat", "in a tide pool",
           "beside a pile of shells"),
          ("white gulls", "a crab walking sideways", "ships far away")),
    Place("in the garden", "the garden",
          ("under the rose bush", "behind the shed", "in the watering can", "between the cabbages"),
          ("bees on the flowers", "a snail on a leaf", "rows of beans")),
    Place("at the market", "the market",
          ("under a fruit stall", "behind the bread cart", "in an empty barrel", "beside the well"),
          ("a man with a violin", "piles of melons", "bright flags")),
    Place("by the river", "the river",
          ("under the bridge", "in the tall reeds", "behind a flat rock", "in an old canoe"),
          ("silver fish", "a heron on one leg", "a water wheel")),
    Place("on the farm", "the farm",
          ("in the hay", "behind the barn", "under the tractor", "beside the pig pen"),
          ("three sleepy cows", "a rooster on the fence", "sheep in the field")),
    Place("in the park", "the park",
          ("under a bench", "behind the fountain", "in the sand box", "beside the swings"),
          ("a pond with ducks", "children on the slide", "a small train")),
    Place("on the mountain", "the mountain",
          ("in a small cave", "behind a tall stone", "under the snow", "beside the spring"),
          ("an eagle in the sky", "the whole valley below", "goats on the cliff")),
    Place("in the library", "the library",
          ("under a desk", "behind the big globe", "on the top shelf", "between two atlases"),
          ("a sleeping cat", "books up to the ceiling", "a map of the world")),
    Place("at the school", "the school",
          ("under the piano", "behind the blackboard", "in a drawer", "beside the coat rack"),
          ("paintings on the wall", "a tank with a goldfish", "a paper moon")),
    Place("in the old castle", "the old castle",
          ("under the stairs", "behind a curtain", "in a rusty helmet", "beside the fireplace"),
          ("a long table", "bats in the tower", "a painting of a knight")),
    Place("on the meadow", "the meadow",
          ("in the long grass", "behind a hay stack", "under a mole hill", "beside the creek"),
          ("yellow butterflies", "a hare with long ears", "poppies and daisies")),
)  # fmt: skip


class Weather(NamedTuple):
    """A cause in the sky, its effect on the ground, and how one can still tell in the end."""

    cause: str
    effect: str
    ending: str


WEATHERS = (
    Weather("It had rained all night", "the paths were full of mud",
            "By then the mud had dried"),
    Weather("A strong wind was blowing", "leaves were flying everywhere",
            "By then the wind had stopped"),
    Weather("The sun was very hot", "everybody was looking for shade",
            "By then the air was cool"),
    Weather("Snow had fallen in the night", "all the roofs were white",
            "Outside, the snow was shining in the moonlight"),
    Weather("Thick fog lay over the land", "nobody could see very far",
            "By then the fog was gone"),
    Weather("It was a cold morning", "the puddles had turned to ice",
            "By then the ice had melted"),
    Weather("Dark clouds were in the sky", "people carried umbrellas",
            "In the end not one drop of rain had fallen"),
    Weather("It was the first day of spring", "the birds were building nests",
            "The birds were still singing of spring"),
    Weather("The night before there had been a storm", "many branches had broken",
            "Nobody was afraid of the storm any more"),
    Weather("The sky was clear and blue", "one could see the far hills",
            "The stars came out in the clear sky"),
)  # fmt: skip

COLOURS = (
    "red", "blue", "green", "yellow", "orange", "purple", "white", "black", "pink", "brown",
    "silver", "golden",
)  # fmt: skip
SIZES = ("small", "big", "old", "new", "shiny", "pretty", "plain", "striped")
OBJECTS = (
    "kite", "ball", "drum", "lantern", "whistle", "toy boat", "basket", "scarf", "hat", "book",
    "key", "ring", "bell", "cup", "box", "doll", "flute", "blanket", "mirror", "umbrella", "shell",
    "button", "glove", "coat", "purse", "pencil",
)  # fmt: skip


class Countable(NamedTuple):
    """A thing one counts, in its two numbers."""

    one: str
    many: str


FOODS = (
    Countable("apple", "apples"), Countable("pear", "pears"), Countable("plum", "plums"),
    Countable("cherry", "cherries"), Countable("strawberry", "strawberries"),
    Countable("walnut", "walnuts"), Countable("carrot", "carrots"),
    Countable("cookie", "cookies"), Countable("muffin", "muffins"), Countable("egg", "eggs"),
    Countable("potato", "potatoes"), Countable("tomato", "tomatoes"),
    Countable("peach", "peaches"), Countable("bun", "buns"), Countable("pancake", "pancakes"),
    Countable("radish", "radishes"),
)  # fmt: skip
SEEDS = (
    Countable("bean", "beans"), Countable("sunflower seed", "sunflower seeds"),
    Countable("pumpkin seed", "pumpkin seeds"), Countable("tulip bulb", "tulip bulbs"),
    Countable("pea", "peas"), Countable("onion", "onions"),
)  # fmt: skip
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth", "fifth")


class Trouble(NamedTuple):
    """Something that is stuck, the tool that helps, and how."""

    state: str  # completes "The kite ..."
    tool: str
    how: str  # completes "{name} ..."; "it" is the stuck thing


TROUBLES = (
    Trouble("was stuck in a tall tree", "a ladder", "climbed up the ladder and shook it loose"),
    Trouble("had fallen into a deep hole", "a rope", "let down the rope and pulled it up"),
    Trouble("was floating in the middle of the pond", "a long stick",
            "reached out with the long stick and brought it to the shore"),
    Trouble("was locked in the cellar", "a rusty key",
            "turned the rusty key and the door swung open"),
    Trouble("had rolled under a heavy cupboard", "a broom",
            "pushed the broom under the cupboard and swept it out"),
    Trouble("was frozen in the ice", "a kettle of hot water",
            "poured the hot water from the kettle until it came free"),
    Trouble("had sunk to the bottom of the well", "a bucket",
            "lowered the bucket and lifted it out"),
    Trouble("was caught in a thorn bush", "a pair of thick gloves",
            "put on the thick gloves and bent the thorns aside"),
    Trouble("was buried in the sand", "a shovel", "dug with the shovel until it came out"),
    Trouble("was hidden in the dark attic", "a bright lamp",
            "held up the bright lamp and saw it at once"),
)  # fmt: skip


class Riddle(NamedTuple):
    """Three clues and the one answer, with its article."""

    clues: tuple[str, str, str]
    answer: str


RIDDLES = (
    Riddle(("It has teeth but never bites", "It goes through your hair",
            "You use it in the morning"), "a comb"),
    Riddle(("It has hands but no fingers", "It has a face but no eyes", "It tells the time"),
           "a clock"),
    Riddle(("It runs but has no legs", "It has a bed but never sleeps", "Fish live in it"),
           "a river"),
    Riddle(("It is full of holes but holds water", "It is soft and light",
            "You wash plates with it"), "a sponge"),
    Riddle(("It gets shorter as it grows old", "It is made of wax", "It gives light at night"),
           "a candle"),
    Riddle(("It has many leaves but is not a tree", "It tells stories without a voice",
            "You read it"), "a book"),
    Riddle(("It has four legs but cannot walk", "Plates stand on it", "We eat at it"),
           "a table"),
    Riddle(("It follows you all day", "It hides in the dark", "The sun draws it on the ground"),
           "a shadow"),
    Riddle(("It falls but is never hurt", "It fills the rivers", "It comes from the clouds"),
           "the rain"),
    Riddle(("It has a thin neck but no head", "It can hold milk or juice", "It is made of glass"),
           "a bottle"),
    Riddle(("It has one eye but cannot see", "A thread goes through it", "It mends your coat"),
           "a needle"),
    Riddle(("It is white when it comes down", "It melts in your hand",
            "Children make men out of it"), "the snow"),
    Riddle(("It has keys but opens no door", "It is black and white", "It makes music"),
           "a piano"),
    Riddle(("It carries its house on its back", "It is very slow", "It leaves a silver line"),
           "a snail"),
)  # fmt: skip


class Skill(NamedTuple):
    """Something to learn: the verb, the first mistake, the advice, and the way it works."""

    verb: str
    mistake: str  # past tense
    advice: str  # an order
    success: str  # past tense


SKILLS = (
    Skill("swim", "swallowed a lot of water", "Kick your legs slowly",
          "swam all the way across the pond"),
    Skill("whistle", "only blew air", "Make your lips round", "whistled a whole song"),
    Skill("skate", "fell on the ice", "Bend your knees", "made a big circle on the ice"),
    Skill("ride a bicycle", "fell into a hedge", "Look far ahead",
          "rode down the whole street"),
    Skill("bake bread", "burned the crust", "Watch the clock",
          "took a perfect loaf out of the oven"),
    Skill("knit", "made a terrible knot", "Count every stitch", "finished a long warm sock"),
    Skill("juggle", "dropped all the balls", "Start with one ball",
          "kept three balls in the air"),
    Skill("paint", "spilled the water", "Use only a little paint",
          "painted a picture of the sunset"),
    Skill("fish", "caught an old boot", "Sit very still", "caught a fat trout"),
    Skill("row a boat", "went round in circles", "Pull with both oars together",
          "rowed straight to the other side"),
    Skill("climb", "slid back down", "Test every branch first", "climbed to the very top"),
    Skill("play the guitar", "broke a string", "Press softly", "played a song for everybody"),
)  # fmt: skip


class Parcel(NamedTuple):
    """Something to carry to somebody, and what it is good for."""

    what: str  # with its article
    short: str  # with "the"
    use: str  # completes "I can ..." / "now {name} can ..."


PARCELS = (
    Parcel("a pot of soup", "the soup", "eat something warm"),
    Parcel("a letter", "the letter", "read the good news"),
    Parcel("a jar of honey", "the honey", "make tea with honey"),
    Parcel("a bottle of medicine", "the medicine", "sleep without a cough"),
    Parcel("a bag of flour", "the flour", "bake a cake"),
    Parcel("a roll of cloth", "the cloth", "sew a dress"),
    Parcel("a box of nails", "the box of nails", "mend the roof"),
    Parcel("a bundle of wood", "the wood", "make a fire"),
    Parcel("a can of paint", "the paint", "paint the fence"),
    Parcel("a sack of corn", "the corn", "feed the chickens"),
)


class Obstacle(NamedTuple):
    """What blocks the way, and two ways past it."""

    what: str
    ways: tuple[str, str]  # past tense, complete "{name} ..."


OBSTACLES = (
    Obstacle("the bridge was broken", ("jumped from stone to stone", "crossed on a fallen tree")),
    Obstacle("a big dog was sleeping on the path",
             ("tiptoed past without a sound", "took the long way round the hill")),
    Obstacle("the road was covered with deep water",
             ("made a raft out of planks", "walked along the top of the wall")),
    Obstacle("a gate was closed", ("climbed over the gate", "asked the farmer to open it")),
    Obstacle("three roads met and there was no sign",
             ("followed the marks of a cart", "looked for the tower of the church")),
    Obstacle("it was getting dark", ("lit a candle", "followed the light of the moon")),
    Obstacle("a herd of sheep filled the whole road",
             ("waited until the last sheep had passed", "rode on the back of the biggest sheep")),
    Obstacle("a fallen rock lay across the path",
             ("crawled under the rock", "rolled the rock aside")),
)  # fmt: skip


class Dish(NamedTuple):
    """A recipe: what it makes, what it counts, and what one can forget."""

    name: str
    parts: tuple[Countable, Countable]
    missing: str
    taste: str


DISHES = (
    Dish("apple pie", (FOODS[0], FOODS[9]), "sugar", "sweet"),
    Dish("vegetable soup", (FOODS[6], FOODS[10]), "salt", "rich"),
    Dish("plum cake", (FOODS[2], FOODS[9]), "butter", "soft"),
    Dish("fruit salad", (FOODS[1], FOODS[12]), "honey", "fresh"),
    Dish("tomato sauce", (FOODS[11], FOODS[6]), "pepper", "spicy"),
    Dish("nut bread", (FOODS[5], FOODS[9]), "yeast", "crunchy"),
    Dish("cherry jam", (FOODS[3], FOODS[4]), "lemon juice", "fruity"),
)


class Accident(NamedTuple):
    """Something that breaks, how, and how it is mended."""

    cause: str  # completes "{name} ..."
    broken: str  # with "the"
    damage: str
    repair: str  # past tense, plural subject


ACCIDENTS = (
    Accident("kicked a ball too hard", "the kitchen window", "broke into many pieces",
             "put in new glass"),
    Accident("ran around the table", "the blue vase", "fell and cracked",
             "glued the pieces together"),
    Accident("left the gate open", "the fence", "was pushed over by the cows",
             "nailed the boards back"),
    Accident("leaned on the shelf", "the tea pot", "lost its handle", "made a new handle of wire"),
    Accident("played with the clock", "the clock", "stopped ticking", "put the tiny wheels back"),
    Accident("jumped on the bed", "the bed", "lost a leg", "made a new leg of oak"),
    Accident("forgot the milk on the stove", "the pot", "turned black",
             "scrubbed it with sand"),
    Accident("pulled the curtain", "the curtain", "tore in the middle",
             "sewed it with white thread"),
)  # fmt: skip


class Young(NamedTuple):
    """A small animal that is lost, its cry, its home, and the sign that leads there."""

    what: str
    cry: str
    home: str
    sign: str


YOUNGS = (
    Young("duckling", "peep", "the pond", "wet prints on the ground"),
    Young("kitten", "meow", "the baker's house", "a trail of flour"),
    Young("lamb", "baa", "the green pasture", "bits of wool on the hedge"),
    Young("puppy", "woof", "the shepherd's hut", "scratches on a door"),
    Young("chick", "cheep", "the hen house", "yellow feathers on the path"),
    Young("calf", "moo", "the red barn", "big prints in the soft earth"),
    Young("fawn", "bleat", "the edge of the wood", "broken twigs and small prints"),
    Young("piglet", "oink", "the farm yard", "a line of turned earth"),
)
HURTS = ("was hungry", "was shaking with cold", "had a thorn in its foot", "was very tired")
GOODS = (
    "a loaf of bread", "a pumpkin", "a candle", "a honey cake", "a bag of nuts", "a ribbon",
    "a wooden spoon", "a pot of jam", "a piece of cheese", "a feather", "a bar of soap",
    "a bunch of flowers",
)  # fmt: skip
GAMES = ("hide and seek", "chess", "catch", "marbles", "hopscotch", "cards")
FEELINGS = ("happy", "glad", "proud", "thankful", "cheerful")
TIMES = ("One morning", "One afternoon", "One evening", "One day", "On Sunday", "On Monday",
         "On Friday", "Last summer", "One winter day")  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
