"""Names and nouns shared by several worlds. Every noun that follows "a" begins with a consonant."""

NAMES = (
    "Alice Ben Carla David Emma Felix Grace Henry Irene Jack Karen Leo Maria Nora Oscar Paula Quentin Rosa Simon Tina Ursula"
    " Victor Wendy Xavier Yvonne Zack Bella Carl Diana Eric Fiona George"
).split()
CITIES = (
    "Paris London Berlin Madrid Rome Vienna Oslo Prague Dublin Lisbon Athens Warsaw Helsinki Budapest Geneva Milan Naples"
    " Munich Hamburg Lyon Seville Porto Krakow Bergen"
).split()
JOBS = (
    "baker teacher doctor farmer lawyer painter singer dancer driver pilot nurse cook waiter tailor barber plumber miner sailor"
    " soldier judge reporter banker builder gardener"
).split()
ANIMALS = (
    "cat dog horse rabbit parrot hamster turtle snake goat sheep pony duck goose lizard frog mouse rat seal pigeon cow pig"
    " donkey crow spider"
).split()
FOODS = (
    "soup bread cheese rice pasta fish cake fruit salad honey pizza chicken butter chocolate yoghurt garlic pepper beans corn"
    " nuts cabbage pumpkin spinach melon"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
