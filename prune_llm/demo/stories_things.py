"""Plots about things: lost, shared, stuck, bought, given, grown, traded. See `Plot`."""

from __future__ import annotations

from prune_llm.demo import stories_words as words
from prune_llm.demo.stories_cast import Beats, Cast, Teller, counted


def lost(t: Teller) -> Cast:
    place = t.pick(words.PLACES)
    return {
        "thing": t.thing(),
        "place": place,
        "wrong": t.pick_new(place.spots),
        "spot": t.pick_new(place.spots),
        "sight": t.pick(place.sights),
        "giver": t.elder(),
    }


LOST: Beats = (
    (
        "{hero} had {thing.full}. It was a present from {giver}.",
        "The thing {hero} loved most was {thing.full}. {giver} had made it for {hero.him}.",
        "{giver} gave {hero} {thing.full}, and {hero.he} took it everywhere.",
    ),
    (
        "{time}, {hero} played {place.where} and looked at {sight}. {weather.cause}, and "
        "{weather.effect}.",
        "{weather.cause}, and {weather.effect}. {hero} went for a walk {place.where} and saw "
        "{sight}.",
    ),
    (
        "When {hero.he} [came home|wanted to go home], the {thing} was gone!",
        "Suddenly {hero} noticed that the {thing} was not there any more.",
    ),
    (
        '"[Oh no|Oh dear]! Where is my {thing}?" [cried|said] {hero}. {hero.he} looked {wrong}, '
        "but there was nothing.",
        "{hero} began to cry. {hero.he} searched {wrong}, but the {thing} was not there.",
    ),
    (
        '{hero.his} friend {friend}, {friend.who}, came by. "What did you lose?" asked '
        '{friend}. "I lost my {thing}," said {hero}.',
        'Then {hero.he} met {friend}, {friend.who}. "Have you seen my {thing.noun}?" '
        'asked {hero}. "What colour is it?" asked {friend}. "It is {thing.colour}," said {hero}.',
    ),
    (
        "{friend} was {friend.trait.word} and {friend.deed}. Together they looked {spot}.",
        '"Let us look {spot}," said {friend}. Because {friend} was {friend.trait.word}, '
        "{friend.he} {friend.deed}.",
    ),
    (
        "There it was! The {thing} lay {spot}, just as {thing.size} as before.",
        'Something {thing.colour} was there. "[I see it|Here it is]!" said {friend}. It was the '
        "{thing}!",
    ),
    (
        '"Thank you, {friend}," said {hero}. "{giver} will be [glad|happy] that we found it."',
        "{hero} hugged {friend} and never left the {thing.noun} {place.where} again.",
        "{hero} was so [happy|glad] that {hero.he} [danced|laughed]. {weather.ending}.",
    ),
)


def sharing(t: Teller) -> Cast:
    have, given = t.number(5, 12), t.number(1, 3)
    eaten = t.number(1, min(3, have - given - 1))
    food = t.pick(words.FOODS)
    return {
        "food": food,
        "place": t.pick(words.PLACES),
        "have": counted(have, food),
        "given": words.NUMBERS[given],
        "rest": counted(have - given, food),
        "eaten": words.NUMBERS[eaten],
        "left": words.NUMBERS[have - given - eaten],
        "left_food": counted(have - given - eaten, food),
        "were": "was" if have - given - eaten == 1 else "were",
        "elder": t.elder(),
    }


SHARING: Beats = (
    (
        "{time}, {elder} gave {hero} a basket. In it there were {have}.",
        "{time}, {hero} had {have} in a bag. They were from {elder}.",
        "{hero} went to see {elder} and came back with {have}.",
    ),
    (
        "{place.where}, {hero.he} met {friend}, {friend.who}. {friend} was [very|so] hungry.",
        "{hero} sat down {place.where}. Soon {friend}, {friend.who}, came and looked at "
        "the {food.many}.",
    ),
    (
        '"[May|Can] I have some {food.many}?" asked {friend}. "[Yes|Of course]," said {hero}, '
        "and gave {given} of them to {friend}.",
        '"You look hungry," said {hero}. "Take {given} of my {food.many}!"',
    ),
    (
        "Now {hero} had {rest}.",
        '"How many do you have now?" asked {friend}. "I have {rest}," said {hero}.',
    ),
    (
        "Because {hero} was {hero.trait.word}, {hero.he} {hero.deed}. Then {hero.he} ate {eaten} "
        "of the {food.many}.",
        "They [talked|laughed] and played {game}. {hero} ate {eaten} of the {food.many} too.",
        "{weather.cause}, and {weather.effect}, so they went inside. There {hero} ate {eaten} of "
        "the {food.many}.",
    ),
    (
        '"How many are left?" asked {friend}. {hero} counted. "{left}," {hero.he} said.',
        "In the end there {were} {left_food} in the basket for the next day.",
        "{hero} looked into the bag and counted {left_food}.",
    ),
    (
        '"Next time I will bring something for you," said {friend}. And {friend.he} did: '
        "{parcel.what}, because {friend.he} was {friend.trait.word}.",
        "{elder} heard about it and was [very|] proud of {hero}. A shared {food.one} is the best "
        "{food.one}.",
        "From that day on {hero} and {friend} were friends, and they always shared their "
        "{food.many}.",
    ),
)


def stuck(t: Teller) -> Cast:
    trouble = t.pick_new(words.TROUBLES)
    return {
        "trouble": trouble,
        "tool": trouble.tool.split(" ", 1)[1],
        "useless": t.pick_new(words.TROUBLES).tool,
        "thing": t.thing(),
        "place": t.pick(words.PLACES),
        "elder": t.elder(),
    }


STUCK: Beats = (
    (
        "{time}, {hero} heard somebody crying {place.where}. It was {friend}, {friend.who}.",
        "{time}, {hero} met {friend}, {friend.who}. {friend} looked [sad|unhappy].",
    ),
    (
        '"What is wrong?" asked {hero}. "My {thing} is gone," said {friend}. The {thing} '
        "{trouble.state}.",
        '"Why are you sad, {friend}?" asked {hero}. Then {hero.he} saw it: the {thing} of '
        "{friend} {trouble.state}.",
    ),
    (
        "First they tried it with {useless}, but that did not help.",
        '"Let us take {useless}," said {friend}. But {useless} was no use at all.',
        "They pulled and shouted, but nothing happened. {weather.cause}, and {weather.effect}.",
    ),
    (
        "{hero} {hero.deed}, for {hero.he} was {hero.trait.word}.",
        '"Do not worry," said {hero}, and {hero.he} {hero.deed}.',
    ),
    (
        '"We need {trouble.tool}," said {hero}. {elder} had {trouble.tool} and gave it to '
        "[them|the two friends].",
        'So they went to {elder}. "Can you lend us {trouble.tool}?" asked {hero}. "Yes, but '
        'bring it back," said {elder}.',
    ),
    (
        "{hero} {trouble.how}.",
        "{friend} held {hero} by the hand. {hero} {trouble.how}.",
    ),
    (
        "{friend} had the {thing} again! It was [a little wet|a little dirty|as good as new], "
        "but {friend} did not mind.",
        '"Here is your {thing}," said {hero}. {friend} smiled at once.',
    ),
    (
        "Then they brought the {tool} back to {elder} and said thank you.",
        '"How did you do it?" asked {elder}. "With {trouble.tool}," said {hero}, "and with a '
        'good friend."',
        "{weather.ending}, and {friend} and {hero} played with the {thing.noun}.",
    ),
)


def shopping(t: Teller) -> Cast:
    coins, price, second = t.number(8, 15), t.number(2, 4), t.number(1, 3)
    return {
        "coins": words.NUMBERS[coins],
        "price": words.NUMBERS[price],
        "second_price": _coins(second),
        "rest": words.NUMBERS[coins - price],
        "left": _coins(coins - price - second),
        "good": t.pick_new(words.GOODS),
        "other": t.pick_new(words.GOODS),
        "elder": t.elder(),
        "seller": t.elder(),
        "sight": t.pick(words.PLACES[3].sights),
    }


def _coins(number: int) -> str:
    return counted(number, words.Countable("coin", "coins"))


SHOPPING: Beats = (
    (
        '{time}, {elder} said to {hero}, "Here are {coins} coins. Please buy {good} and {other}."',
        "{elder} wanted {good} and {other}. So {hero} went to the market with {coins} coins.",
    ),
    (
        "{weather.cause}, and {weather.effect}, but {hero} went anyway.",
        "At the market {hero.he} saw {sight}.",
        "On the way {hero.he} met {friend}, {friend.who}, and they went together.",
    ),
    (
        '"How much is {good}?" asked {hero}. "{price} coins," said {seller}. {hero} paid, and '
        "now {hero.he} had {rest} coins.",
        "{seller} sold {good} for {price} coins. {hero} bought it and had {rest} coins left.",
    ),
    (
        'Then {hero.he} asked for {other}. "That is {second_price}," said {seller}.',
        "{seller} also had {other}. It cost only {second_price}, and {hero} took it.",
    ),
    (
        "By mistake {seller} gave back too much money. But {hero} was {hero.trait.word} and "
        "{hero.deed}. {hero.he} gave the wrong coin back.",
        "{hero} was {hero.trait.word} and carried everything without help.",
        "{hero} put everything into a basket and walked home.",
    ),
    (
        'At home {elder} asked, "How much money is left?" {hero} counted. "I have {left}," '
        "{hero.he} said.",
        "{hero} came home with {good}, {other} and {left}.",
    ),
    (
        '"[Well done|Good work], {hero}," said {elder}. "You may keep the money."',
        "{elder} was {feeling} and made {hero} a cup of cocoa. {weather.ending}.",
        "{elder} thanked {hero.him}, and {hero} was proud for the rest of the day.",
    ),
)


def present(t: Teller) -> Cast:
    return {
        "thing": t.thing(),
        "wrong": t.thing(),
        "elder": t.elder(),
        "place": t.pick(words.PLACES),
        "age": words.NUMBERS[t.number(5, 12)],
    }


PRESENT: Beats = (
    (
        "{hero} had a friend, {friend.who} named {friend}. Soon {friend} would be {age} years old.",
        "The birthday of {friend}, {friend.who}, was near. {friend} would be {age}.",
    ),
    (
        "{hero} knew that {friend} loved everything {thing.colour}. {friend} also wanted "
        "{thing.one} more than anything.",
        '"What do you wish for?" asked {hero}. "I would like {thing.one}," said {friend}, "and '
        'my favourite colour is {thing.colour}."',
    ),
    (
        "So {hero} went to the shop of {elder}. The first {wrong.noun} there was {wrong.colour}.",
        'In the shop of {elder} there was {wrong.a}. "No," said {hero}, "{friend} does not like '
        '{wrong.colour} things."',
    ),
    (
        '"Do you have {thing.a}?" asked {hero}. "[I had one|We sold one] yesterday," said '
        '{elder}, "but you can make one."',
        '"I need {thing.a}," said {hero}. {elder} looked everywhere and shook {elder.his} head.',
    ),
    (
        "{hero} {hero.deed}. Then {hero.he} found {thing.one} {place.where} and painted it "
        "{thing.colour}.",
        "Because {hero.he} was {hero.trait.word}, {hero} {hero.deed}. In the evening "
        "{thing.a} was ready.",
    ),
    (
        'On the birthday there were {age} candles on the cake. {friend} opened the box. "{thing.a}!'
        '" {friend.he} [cried|shouted].',
        "{friend} blew out {age} candles and opened the present. It was {thing.a}!",
    ),
    (
        '"How did you know that I like {thing.colour} so much?" asked {friend}. "You told me '
        '[once|long ago]," said {hero}.',
        "{friend} took the {thing} to bed that night. {weather.ending}.",
        "Everybody ate cake and played {game}, and {friend} held the {thing} the whole time.",
    ),
)


def garden(t: Teller) -> Cast:
    rows, each = t.number(2, 4), t.number(2, 5)
    bad = t.number(1, 3)
    seed = t.pick(words.SEEDS)
    total = rows * each
    return {
        "seed": seed,
        "rows": words.NUMBERS[rows],
        "each": words.NUMBERS[each],
        "total": counted(total, seed),
        "bad": words.NUMBERS[bad],
        "good": words.NUMBERS[total - bad],
        "elder": t.elder(),
        "animal": t.pick(("crow", "hare", "slug", "mole", "goose")),
        "weeks": words.NUMBERS[t.number(2, 6)],
    }


GARDEN: Beats = (
    (
        "{hero} wanted a garden of {hero.his} own. {elder} gave {hero.him} {total}.",
        '{time}, {elder} came with {total}. "Plant them, {hero}, and see what happens," said '
        "{elder}.",
    ),
    (
        "{hero} made {rows} rows and put {each} into every row.",
        "There were {rows} rows in the garden. In each row {hero} planted {each} {seed.many}.",
    ),
    (
        "Every day {hero.he} brought water, for the earth was dry.",
        '"Now you must wait {weeks} weeks," said {elder}. {hero} was {hero.trait.word} and '
        "{hero.deed}.",
        "{weather.cause}, and {weather.effect}, but {hero} went to the garden every day.",
    ),
    (
        "But one night a hungry {animal} came and ate {bad} of them.",
        '"Oh no!" said {hero} after {weeks} weeks. A {animal} had been there, and {bad} of the '
        "{seed.many} were gone.",
    ),
    (
        "{friend}, {friend.who}, helped {hero} to build a fence, so the {animal} could "
        "not come back.",
        '"How can I stop the {animal}?" asked {hero}. "Build a fence," said {friend}, '
        "{friend.who}. And so they did.",
    ),
    (
        "All the others grew. {hero} counted the plants: there were {good}.",
        '"How many are growing?" asked {friend}. "We had {total}, and {bad} were eaten," said '
        '{hero}. "So there are {good}."',
    ),
    (
        "In autumn {hero} brought the first basket to {elder}, and the second to {friend}.",
        '"You have worked hard," said {elder}. {hero} was {feeling}. Even the {animal} got a '
        "little.",
        "{elder} came to look at the garden. {weather.ending}, and everything was green.",
    ),
)


def trade(t: Teller) -> Cast:
    return {
        "thing": t.thing(),
        "first": t.pick_new(words.GOODS),
        "second": t.pick_new(words.GOODS),
        "elder": t.elder(),
        "buyer": t.elder(),
        "place": t.pick(words.PLACES),
    }


TRADE: Beats = (
    (
        "{hero} had {first} but wanted {thing.full}.",
        '{time}, {hero} saw {thing.full} in a window. "I wish it were mine," said {hero.he}, but '
        "all {hero.he} had was {first}.",
    ),
    (
        "{place.where}, {hero} met {friend}, {friend.who}. {friend} had {second} and no use for "
        "it.",
        '{hero} showed {first} to {friend}, {friend.who}. "I need that!" said {friend}. "I can '
        'give you {second}."',
    ),
    (
        "So they traded: {friend} got {first}, and {hero} got {second}.",
        '"{first} for {second}? That is fair," said {hero}, and they shook hands.',
    ),
    (
        "A little later {elder} came along the road. {elder} had looked for {second} all day.",
        "Near the well sat {elder}. {elder.he} wanted to make dinner, and only {second} was "
        "missing.",
    ),
    (
        "{hero} {hero.deed}, because {hero.he} was {hero.trait.word}.",
        "{weather.cause}, and {weather.effect}, so they talked for a long time.",
        '"Is it [really|] for me?" asked {elder}. "Yes," said {hero}.',
    ),
    (
        "{elder} took {second} and opened an old box. In it was {thing.a}!",
        "In return {elder} gave {hero} the {thing} from the window.",
        '"Then take this," said {elder}, and gave {hero.him} {thing.a}.',
    ),
    (
        'At home {buyer} asked, "Where does the {thing} come from?" "First I had {first}, then '
        '{second}, and now I have this," said {hero}.',
        "That evening {hero} told {buyer} how {first} became {second}, and how {second} became "
        "{thing.a}.",
    ),
    (
        "{buyer} laughed. {weather.ending}.",
        "{hero} played with the {thing.noun} until it was time for bed.",
        "And {friend} was {feeling} too, for {friend.he} still had {first}.",
    ),
)
