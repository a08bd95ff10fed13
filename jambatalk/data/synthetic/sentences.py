"""What the synthetic people say: sentences written for this project, rich in p, b, m and in all vowels.

COMMON is read by everyone; SPOKEN is dealt out to the identities. HELD_OUT is only read by the validation and test
identities, as their second half, so that nothing scored there was heard in training.
"""

import re

import numpy as np

COMMON = """
Bob may pop the balloon, but Pam will buy a bigger one.
My mother baked a plum pie for the neighbours.
Please put the blue map back beside the lamp.
We walked home slowly, and the moon came up.
Five foxes fled from the farm before the fire.
Why would you want to wait, when the water is warm?
The baby's bib is damp, so bring me a dry one.
Joe owns an old boat, and rows it over the cove.
Which child shook the cherry tree, you or Charlie?
I hear the birds early, then I hear the bell.
""".strip().splitlines()

SPOKEN = """
A puppy jumped up on the table and broke the lamp.
Tom met Mabel on the bumpy path above the mill.
Keep both thumbs on top of the wheel, please.
Maybe people will remember how brave the pilot was.
The painter mixed purple and brown, but made mud.
Pick a number, multiply it by two, and stop.
Hope is a small boat in a very big storm.
Nobody bought the broken piano from the pub.
My brother's beard is bushy, and my uncle's is trim.
Peel the apples, chop them, and boil them with honey.
The bees hummed in the warm summer garden.
We move into the big white house on Monday.
Blow out the lamp before you go up to bed.
The bottom of the pot is black from the camp fire.
Put some more butter and jam on my bread.
Pay the man at the booth, then park by the pump.
The robin hopped from the bush to the window.
Amber beads lay about on the marble steps.
A humble farmer keeps pumpkins in the barn.
Imagine a bridge made of rope and bamboo.
Remember me when the apple trees bloom.
The bus was empty, apart from a man with a cymbal.
Pam clapped, Bob bowed, and the band began to play.
Several lamps by the bay were blinking.
Open the map, and point to the nearest mountain.
The new maid mopped up most of the milk.
Few of them have ever found the cave above the falls.
Vera gave five velvet gloves to her favourite nephew.
The waves are rough, so we left the ferry and drove.
If Fred is free, he may fix the front fence.
Every evening the fog moves over the valley.
Have you ever driven a van through a river?
The wolf was away, and the sheep went wild.
We were quiet while the choir was singing.
One windy week in March we flew a white kite.
Would you wash the wool, or leave it as it was?
The queen wore a wide crown made of willow.
You should soon see a huge blue moose.
Two new shoes were lost in the cool pool.
Ruth threw the spoon through the school roof.
Who knew the tune, and who chose the music?
Go home alone, Joan, the road is frozen.
The old goat chewed on a rope of snowy wool.
He wrote a note, folded it, and rowed to the coast.
Grow oats and gold corn on the low slope.
She feels the breeze, and sees three green leaves.
Each evening we eat beans, peas and cheese.
Jean keeps a neat and tidy streak of sheep.
He needs these keys to leave the deep cellar.
Big ships drift in with the wind and the mist.
His little sister sits still and knits a mitten.
The thick ink is still in the tin dish.
Ten men sent seven letters to the west.
Let me guess, the red pen is never ready.
Ned said the best bread is sold at seven.
The sad cat sat and had a nap on my lap.
Pack that black bag, and pass the candle.
Ask Dan about the plan, he has the facts.
A happy man ran past with a stack of pans.
Father is calm, and the car is in the park.
Stop the clock, the doctor is not far off.
My aunt parked the large cart in the barn.
All autumn long the tall hawk walked the lawn.
Paul saw a small ball fall on the porch.
She bought four more horses in the north.
Some young cousins come for lunch on Sunday.
The sun was up, but the mud was not yet dry.
Just jump, the drop is nothing much.
Look, the good cook put sugar in the pudding.
He took a book, and stood by the brook.
Bert turned early, and learned to work with birds.
The nurse heard words that she had never learned.
Now count the brown cows around the house.
How loud is the crowd, now that the town is out?
I might try to fly a kite high in the sky.
Nine bright lights lie along the tired river.
The boy enjoyed his noisy toy, and made his choice.
Point the coin at the oil, and avoid the voices.
Day by day the rain may fade away.
They say that the train to Spain is late again.
Near the pier we hear a cheer from the years gone by.
Take care, there is a bear on the chair upstairs.
Thank the thin man, then breathe through your mouth.
These three brothers gather other feathers together.
Measure the treasure, then close the garage.
She should wash the shelves, and shut the shop.
Much of the lunch was cheese, with a peach for each.
The judge's jacket is just a large orange jumble.
Six sisters sat in silence, then they sang.
His rose is frozen, and the breeze is rising.
A king was singing, while a young gang was hanging lamps.
Ron wrote a rather rude letter, and ran right away.
Lily left a little yellow lily on the hill.
Yes, you may use my yellow yarn this year.
Hand him the heavy hammer, he will hurry home.
Don't tell Dad that the dinner table is dented.
Time to turn the tap, take a towel, and tidy up.
Kate can cook a cake, if Greg can get the eggs.
The dog dug a deep dark den under the garden gate.
Can you keep quick, or will your coat catch on the crate?
Slowly, very slowly, the snail moved over the moss.
Wait for me, I said, but nobody stopped.
First we sweep, then we mop, and then we may rest.
On Thursday, if it is warm, we may swim at the bay.
""".strip().splitlines()

HELD_OUT = """
A camel may march for months on very poor food.
Both beaver families built a dam below the bridge.
My plump puppy plopped into a puddle of pale mud.
Perhaps the ambulance will come past the museum.
Poor Bill fumbled with the broken umbrella.
Each member of the club brought a lemon and a pear.
From the top, the whole bay was visible.
Mum hung a bright lamp above the bamboo chair.
Shall we have some soup, or simply bread and ham?
The bank opens at eight, but the baker is up by four.
We found the vase, a fan, and five fine forks.
Why is the new moon so low over our roof?
Give the vet a photograph of the wounded dove.
Wet wool is warm, while wet cotton is cold.
You two move the stool, I will move the broom.
Most of the smoke rose over the open ocean.
Sheila sees the sea, and it seems to be asleep.
Bring in the fish, and fill the kitchen sink.
Many men said yes, then ten of them left.
Sam had a bad map, and that was that.
Mark's car is parked in the yard, not far from the barn.
Call the tall man in, it is a long walk.
Up above, a couple of doves come and go.
She could cook a good pudding without looking.
The third girl heard the early bird first.
How about a mouse in the brown house by the town?
My wife likes ripe limes, and I like pie.
Roy's voice was noisy, but full of joy.
They came by plane, and made their way to the lake.
Breathe in, hold it, and let the breath out slowly.
The best map of the moon hangs in her bedroom.
Number seven, the one by the pump, is empty.
""".strip().splitlines()

# After the common ones and OWN of SPOKEN, which are dealt out so that few people share one, everybody goes on with
# composed sentences: grammatical, mostly nonsense, and never the same twice, so that a model must hear what is said
# instead of knowing it.
OWN = 8

_NAMES = """Abby Ben Bob Carla Chip Dave Emma Fiona Frank George Hugo Ivy Jack Jim Joyce Kim Laura Leo Maggie Max
Mia Nora Oscar Owen Pam Paul Phoebe Pip Robin Rose Ruth Sam Sheila Shaun Steve Theo Tim Vera Violet Will Zoe""".split()
_THINGS = """apple arm badge bag ball band bath beam bear bee bell bench bird boat bone book boot bottle bowl box
branch bridge broom brush bucket bus cabin cake camp candle car carpet cat chain chair cheese chimney church clock
cloud coat coin corner cup curtain cushion dish doctor dog door dream dress drum duck engine fan farm feather fence
field finger fire fish flag flower fork fox frame frog game garden gate ghost glove goat gold grape guitar hall
hammer hat heart hill hoop horse house island jam jar jewel job judge jug key king kite kitten knife ladder lamp
leaf lemon letter lion lip log map market match measure meal melon mirror mole monkey moon mop mouse mouth museum
mushroom nail neck needle nest night note nurse oil onion orange oven owl package page paint palace path peach pear
pebble pen pepper piano picture pie pigeon pillow pipe plane plate plum pocket pond pool poppy pot prize puppet
puzzle queen rabbit radio ribbon ring river road robe rock roof room rope sail salad sauce school sheep shelf ship
shirt shoe shop shower song soup spider spoon stamp star steam stone storm story street sugar sun table tail teacher
thief thumb ticket toe tooth towel tower toy train tree tube umbrella uncle valley van vase vegetable village violin
voice wagon wall watch water wave wheel whip window wing wolf wood wool worm yard zebra zoo""".split()
_KINDS = """amber awful bare beige big black blue bold brave bright broad broken brown busy calm cheap clean clever
cold cool curious damp dark deep dim dry dusty dull early easy empty famous fat few fine firm five flat foggy
foolish four free fresh funny gentle giant good grand green grey happy hard heavy hollow huge humble icy jolly large
lazy light little lonely long loud lovely low loyal mad many mild modern narrow neat nervous new nice noble noisy
odd old open pale patient perfect pink plain plump poor proud pure purple quick quiet rare raw red rich ripe rough
round royal rude sad safe several shallow sharp shiny short shy silver simple sleepy slim slow small smooth soft
sour square stiff strange strong sweet tall thick thin three tidy tiny tired tough ugly useful vague warm weak wet
white whole wide wild wise wooden worn yellow young""".split()
_DEEDS = """admired asked avoided bathed beat blamed boiled bought broke brought brushed built buried called carried
caught changed chased chose cleaned climbed closed combed cooked copied counted crossed cut drew dropped enjoyed fed
filled fixed followed forgot found gave grabbed greeted guarded hated heard helped hid hugged hurried imagined
joined judged jumped kept kicked knew lifted liked lit loved made measured mended met mixed moved named needed
noticed opened owned packed paid painted passed peeled picked placed planned played pleased poured praised pressed
proved pulled pushed put reached refused remembered rubbed saved saw served sewed shaped shared shook showed shut
sold solved stirred stole surprised swapped taught threw tied took touched turned used visited wanted warmed washed
watched waved weighed wiped wrapped wrote""".split()
_WHERE = """above across after along among around before behind below beneath beside between beyond by inside near
opposite over past through towards under upon with without""".split()
_HOW = """again almost always badly barely boldly calmly early easily gladly happily hardly maybe mostly never often
once perhaps probably quickly quietly rarely slowly softly sometimes soon suddenly twice usually warmly""".split()
_JOIN = ["and", "but", "while", "because", "so", "before", "after", "though", "when", "until"]

_SHAPES = (
    "The {kind} {thing} {how} {deed} the {thing} {where} the {kind} {thing}.",
    "{name} {deed} a {kind} {thing}, {join} {name} {deed} the {thing}.",
    "{how}, the {thing} and the {kind} {thing} {deed} {name} {where} the {thing}.",
    "Who {deed} my {kind} {thing} {where} the {thing}, {name} or {name}?",
    "{where} the {kind} {thing}, {name} {how} {deed} every {kind} {thing}.",
    "{name}, {name} and {name} {deed} some {kind} {thing} {where} our {thing}.",
    "We {deed} the {thing}, {join} they {how} {deed} your {kind} {thing}.",
    "If {name} {deed} this {thing}, why have you {how} {deed} that {kind} {thing}?",
)


def compose(rng: np.random.Generator) -> str:
    """One composed sentence, of eight to thirteen words."""
    words = dict(name=_NAMES, thing=_THINGS, kind=_KINDS, deed=_DEEDS, where=_WHERE, how=_HOW, join=_JOIN)
    shape = _SHAPES[rng.integers(len(_SHAPES))]
    text = re.sub(r"\{(\w+)\}", lambda slot: words[slot[1]][rng.integers(len(words[slot[1]]))], shape)
    return text[0].upper() + text[1:]
