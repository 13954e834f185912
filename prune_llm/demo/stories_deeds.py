"""Plots about deeds: racing, guessing, carrying, mending, baking, rescuing, learning.

See `stories_cast.Plot`.
"""

from __future__ import annotations

from prune_llm.demo import stories_words as words
from prune_llm.demo.stories_cast import Beats, Cast, Teller, counted


def race(t: Teller) -> Cast:
    place = t.pick(words.PLACES)
    return {
        "third": t.character(),
        "place": place,
        "sight": t.pick(place.sights),
        "prize": t.thing(),
        "elder": t.elder(),
        "laps": words.NUMBERS[t.number(2, 5)],
        **_obstacle(t),
    }


RACE: Beats = (
    (
        "{time} there was a race {place.where}. {hero} ran against {friend}, "
        "{friend.who}, and {third}, {third.who}.",
        "{elder} planned a race. Three wanted to run: {hero}, {friend} the {friend.kind} and "
        "{third} the {third.kind}.",
    ),
    (
        'The prize was {prize.full}. "{laps} times around, and no tricks," said {elder}.',
        '"Whoever wins gets the {prize}," said {elder}. They had to run {laps} rounds.',
    ),
    (
        "{weather.cause}, and {weather.effect}. {friend} was the fastest at the start, and "
        "{third} was last.",
        "One, two, three, go! {friend} was ahead, and {third} was far behind.",
    ),
    (
        "But {friend} was too sure of winning. {friend.he} sat down to eat {good} and fell asleep.",
        "But then {friend} stopped to look at {sight}, and {hero} ran past {friend.him}.",
    ),
    (
        "In the last round {obstacle.what}. {hero} {way}.",
        "{hero} was {hero.trait.word}: {hero.he} {hero.deed}.",
    ),
    (
        "Near the end {third} fell and hurt {third.his} knee. {hero} stopped, went back and "
        "helped {third.him} up. So {hero} and {third} came in together, and {friend} was last.",
        "{hero} came in first, {third} was second, and {friend} was third.",
    ),
    (
        '"{hero} gets the {prize}," said {elder}. {friend} said, "I should not have stopped."',
        'So the {prize} went to {hero}. "You ran well," said {third}. "So did you," said {hero}.',
        "{hero} won the {prize}, but {hero.he} let {friend} and {third} play with it too.",
    ),
)


def _obstacle(t: Teller) -> Cast:
    obstacle = t.pick_new(words.OBSTACLES)
    return {"obstacle": obstacle, "way": t.pick(obstacle.ways)}


def riddle(t: Teller) -> Cast:
    riddle, wrong = t.pick_new(words.RIDDLES), t.pick_new(words.RIDDLES)
    return {
        "clue": riddle.clues[0],
        "second_clue": riddle.clues[1],
        "third_clue": riddle.clues[2],
        "third_clue_low": riddle.clues[2][0].lower() + riddle.clues[2][1:],
        "answer": riddle.answer,
        "wrong": wrong.answer,
        "elder": t.elder(),
        "prize": t.thing(),
        "place": t.pick(words.PLACES),
    }


RIDDLE: Beats = (
    (
        "{place.where} lived {elder}, who knew all the riddles in the world. {time}, {hero} and "
        "{friend}, {friend.who}, came to visit.",
        "{time}, {hero} and {friend}, {friend.who}, met {elder} {place.where}. {elder} loved "
        "riddles.",
    ),
    (
        '"Who can guess my riddle gets {prize.full}," said {elder}.',
        '"If you find the answer, I will give you {prize.a}," said {elder}.',
    ),
    (
        '"Listen. {clue}. {second_clue}. What is it?"',
        '"{clue}," said {elder}. "{second_clue}. Now tell me what it is."',
    ),
    (
        '"It is {wrong}!" [cried|shouted] {friend}. "No," said {elder}. "Think again."',
        '"Is it {wrong}?" asked {friend}. {elder} laughed and shook {elder.his} head.',
    ),
    (
        '{hero} was {hero.trait.word} and {hero.deed}. "Tell us one more thing," said {hero}. '
        '"{third_clue}," said {elder}.',
        '"Please help us a little," said {friend}. "Well," said {elder}, "{third_clue_low}."',
    ),
    (
        '"Then I know it," said {hero}. "It is {answer}!"',
        '"{answer}!" said {hero} [suddenly|slowly|with a smile].',
    ),
    (
        '"Right! It is {answer}," said {elder}, and gave {hero} the {prize}.',
        "{elder} was surprised. {elder.he} got up and brought the {prize}.",
    ),
    (
        "{friend} was not angry that {wrong} was the wrong answer. They took turns with the "
        "{prize.noun}.",
        "On the way home they made up a riddle of their own. {weather.ending}.",
        'At home {hero} asked everybody: "{clue}. What is it?" Nobody knew that it was {answer}.',
    ),
)


def errand(t: Teller) -> Cast:
    return {
        "parcel": t.pick(words.PARCELS),
        "elder": t.elder(),
        "target": t.elder(),
        "place": t.pick(words.PLACES),
        "village_there": t.pick_new(words.VILLAGES),
        **_obstacle(t),
    }


ERRAND: Beats = (
    (
        '{time}, {elder} said, "{hero}, please bring {parcel.what} to {target} in '
        '{village_there}."',
        "{target} lived in {village_there}, far away. {time}, {elder} asked {hero} to bring "
        "{parcel.what} there.",
    ),
    (
        "{weather.cause}, and {weather.effect}, when {hero} left.",
        '"Be careful on the way to {village_there}," said {elder}. {hero} promised it.',
    ),
    (
        "{hero} walked for {hours} hours and came past {place.noun}. Then {obstacle.what}.",
        "After {hours} hours {hero.he} was tired. And then {obstacle.what}!",
    ),
    (
        "{hero} was {hero.trait.word}. {hero.he} {hero.deed}. Then {hero.he} {way}.",
        '"What shall I do?" thought {hero}. In the end {hero.he} {way}.',
    ),
    (
        'On the other side {hero} met {friend}, {friend.who}. "What do you carry?" asked '
        '{friend}. "{parcel.what} for {target}," said {hero}.',
        'There stood {friend}, {friend.who}. "Where are you going?" asked {friend}. "To '
        '{village_there}," said {hero}, "to see {target}."',
    ),
    (
        "{friend} knew the way and came along, and the two played {game} while they walked.",
        '"I live next to {target}," said {friend}. "Come with me!"',
    ),
    (
        'At last {hero} knocked at the door. "I bring you {parcel.what} from {elder}," {hero.he} '
        "said.",
        "In {village_there}, {target} opened the door, and {hero} gave {target.him} "
        "{parcel.short}.",
    ),
    (
        '"Now I can {parcel.use}," said {target}. "Please thank {elder} for me."',
        "{target} was {feeling}. Now {target.he} could {parcel.use}.",
    ),
    (
        'At home {elder} asked how it was. "First {obstacle.what}," said {hero}, "but I {way}, '
        'and {friend} showed me the house."',
        "{weather.ending}, and {hero} was at home with {elder} again.",
        "{hero} stayed the night, and in the morning {hero.he} went back to {elder}.",
    ),
)


def accident(t: Teller) -> Cast:
    return {
        "accident": t.pick(words.ACCIDENTS),
        "elder": t.elder(),
        "days": words.NUMBERS[t.number(2, 6)],
    }


ACCIDENT: Beats = (
    (
        "{time}, {hero} and {friend}, {friend.who}, were in the house of {elder}.",
        "{hero} often visited {elder} together with {friend}, {friend.who}.",
    ),
    (
        "{weather.cause}, and {weather.effect}, so they played {game} inside.",
        "They were bored, because {elder} was asleep in {elder.his} chair.",
    ),
    (
        "Then {hero} {accident.cause}, and {accident.broken} {accident.damage}.",
        "{hero} {accident.cause}. Crash! {accident.broken} {accident.damage}.",
    ),
    (
        '"Let us say that [the wind|the cat] did it," said {friend}. But {hero} did not want to '
        "lie.",
        '"Nobody has seen it," said {friend}. "Let us run!" "No," said {hero}. "That would be '
        'wrong."',
    ),
    (
        "{hero} {hero.deed}, for {hero.he} was {hero.trait.word}.",
        "{hero} was afraid, but {hero.he} went to {elder}.",
    ),
    (
        '"{elder}, I {accident.cause}, and {accident.broken} {accident.damage}. I am sorry," '
        "said {hero}.",
        '{hero} woke {elder} and told {elder.him} the truth. "I {accident.cause}," {hero.he} '
        'said. "It was me."',
    ),
    (
        '"Thank you for the truth," said {elder}. "{accident.broken} can be mended."',
        '{elder} was quiet for a moment. Then {elder.he} said, "I am not angry, because you did '
        'not lie."',
    ),
    (
        "Together they {accident.repair}. It took {days} days.",
        "{hero}, {friend} and {elder} worked for {days} days. They {accident.repair}.",
    ),
    (
        "After {days} days nobody could see what had happened. {weather.ending}.",
        '"Next time I will tell the truth too," said {friend}.',
        "{elder} never forgot that {hero} had been so honest.",
    ),
)


def baking(t: Teller) -> Cast:
    dish = t.pick(words.DISHES)
    first, second, more = t.number(2, 6), t.number(2, 5), t.number(1, 3)
    return {
        "dish": dish,
        "first": counted(first, dish.parts[0]),
        "second": counted(second, dish.parts[1]),
        "have": words.NUMBERS[first],
        "more": words.NUMBERS[more],
        "need": counted(first + more, dish.parts[0]),
        "need_number": words.NUMBERS[first + more],
        "elder": t.elder(),
        "guest": t.elder(),
    }


BAKING: Beats = (
    (
        "{time}, {hero} and {friend}, {friend.who}, wanted to make {dish.name} for {guest}.",
        '"{guest} is coming for dinner," said {friend}, {friend.who}. "Let us make {dish.name}," '
        "said {hero}.",
    ),
    (
        "The book said: take {need} and {second}. But {hero} had only {first}.",
        'They needed {need} and {second}. "I have only {first}," said {hero}.',
    ),
    (
        '"How many more do we need?" asked {friend}. "{more} more," said {hero}.',
        "{have} and {more} make {need_number}, so {more} were missing. {friend} ran and got them.",
    ),
    (
        "{friend} cut everything, and {hero} stirred the pot. {weather.cause}, but the kitchen "
        "was warm.",
        "{hero} was {hero.trait.word} and {hero.deed}, and {friend} washed the bowls.",
    ),
    (
        'Then {friend} tasted it. "Something is missing," said {friend}. They had no '
        "{dish.missing}!",
        '"Oh no," said {hero}. "We forgot the {dish.missing}!"',
    ),
    (
        "{hero} ran next door to {elder}. {elder} gave {hero.him} a cup of {dish.missing}.",
        '"Do you have any {dish.missing}?" {hero} asked {elder}. "Of course, and may I come too?" '
        "said {elder}.",
    ),
    (
        "In the evening {guest} sat down at the table. The {dish.name} was {dish.taste} and warm.",
        '{guest} ate and ate. "This {dish.name} is so {dish.taste}!" said {guest}.',
    ),
    (
        '"What is in it?" asked {guest}. "{need} and {second}," said {hero}, "and the '
        '{dish.missing} of {elder}."',
        "There was some {dish.name} left, and {friend} brought it to {elder}.",
        "{weather.ending}, and everybody was {feeling} and full.",
    ),
)


def rescue(t: Teller) -> Cast:
    return {
        "young": t.pick(words.YOUNGS),
        "hurt": t.pick(words.HURTS),
        "place": t.pick(words.PLACES),
        "elder": t.elder(),
        "days": words.NUMBERS[t.number(2, 5)],
    }


RESCUE: Beats = (
    (
        '{time}, {hero} was {place.where}. "{young.cry}, {young.cry}!" {hero.he} heard. It was a '
        "little {young.what}.",
        "{weather.cause}, and {weather.effect}. {place.where}, {hero} found a little {young.what} "
        "all alone.",
    ),
    (
        "The {young.what} {hurt}. It had lost its mother.",
        '"Where is your mother?" asked {hero}. But the {young.what} only said "{young.cry}". It '
        "{hurt}.",
    ),
    (
        "{hero} was {hero.trait.word}. {hero.he} {hero.deed}. Then {hero.he} took "
        "the {young.what} home.",
        "{hero} put the {young.what} into {hero.his} coat and carried it to {elder}.",
    ),
    (
        "{elder} gave it warm milk and a bed of straw. After {days} days it was strong again.",
        '"It must rest for {days} days," said {elder}. {hero} sat beside it all the time.',
    ),
    (
        'Then {friend}, {friend.who}, came by. "I have seen {young.sign}," said {friend}.',
        '"How can we find its mother?" {hero} asked {friend}, {friend.who}. "Look for '
        '{young.sign}," said {friend}.',
    ),
    (
        "{hero} and {friend} went out and found {young.sign}. The trail led to {young.home}.",
        "They looked for {young.sign} and followed the trail as far as {young.home}.",
    ),
    (
        '"{young.cry}!" called a deep voice at {young.home}. It was the mother of the '
        "{young.what}!",
        "The mother was waiting at {young.home}. The {young.what} ran to her at once.",
    ),
    (
        '{hero} was a little sad, but {friend} said, "Now the {young.what} is at home."',
        "{weather.ending}. Since then {hero} and {friend} visit {young.home} on every {day}.",
        "When {hero} told {elder} about {young.home}, {elder} was {feeling}.",
    ),
)


def skill(t: Teller) -> Cast:
    tries = t.number(3, 9)
    return {
        "skill": t.pick(words.SKILLS),
        "elder": t.elder(),
        "place": t.pick(words.PLACES),
        "tries": words.NUMBERS[tries],
        "after": words.NUMBERS[tries + 1],
    }


SKILL: Beats = (
    (
        "{hero} wanted to learn to {skill.verb}. {elder} could do it very well.",
        "All the others could {skill.verb}, only {hero} could not.",
    ),
    (
        "{time}, {hero.he} tried it for the first time and {skill.mistake}. {friend}, "
        "{friend.who}, saw it and laughed.",
        "{hero} tried to {skill.verb}, but {hero.he} {skill.mistake}. {friend}, {friend.who}, "
        "laughed.",
    ),
    (
        '"I will never learn to {skill.verb}," said {hero}. {hero.he} sat down {place.where}.',
        "{weather.cause}, and {weather.effect}, and {hero} felt very small.",
    ),
    (
        '"{skill.advice}," said {elder}. "That is how I learned to {skill.verb}."',
        '{elder} had seen it too. "Do you want to know the secret?" {elder.he} asked. '
        '"{skill.advice}!"',
    ),
    (
        "{hero} was {hero.trait.word} and {hero.deed}. {tries} times it went wrong.",
        "{hero} tried {tries} times, and {tries} times {hero.he} {skill.mistake}.",
    ),
    (
        "But after {tries} times comes number {after}. This time {hero.he} {skill.success}!",
        'Then {hero.he} remembered the words of {elder}: "{skill.advice}." And {hero.he} '
        "{skill.success}!",
    ),
    (
        '{friend} did not laugh any more. "Can you teach me to {skill.verb}?" asked {friend}.',
        '{friend} saw it and clapped. "How did you do that?" asked {friend}.',
    ),
    (
        '"{skill.advice}," said {hero}. "I {skill.mistake} too, {tries} times."',
        '"It is easy," said {hero}. "{elder} told me how. {skill.advice}!"',
        '"You only have to try {after} times," said {hero} and smiled. {weather.ending}.',
    ),
)
