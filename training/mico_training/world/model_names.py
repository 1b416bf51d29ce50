"""Plain English names for the entries of the furniture catalogues."""

from __future__ import annotations

from functools import cache

# Plain name: the catalogue's names. What hangs on walls, lies flat or has no plain name is absent.
_PLAIN_NAMES = """
armchair: Armchair, Winchester armchair, Modern armchair, Rattan armchair, Armchair ottoman
chair: Chair, Oak chair, Chair with cushion, Osaka chair, Plastic chair, Cafe chair, Children chair
chair: Child chair, Folding chair, Class seat, Relax chair, Ryokan chair
deck chair: Deck chair, Beach chair, Pool lounge
high chair: Baby high chair
wheelchair: Wheelchair
stool: Stool, Bar stool, Bar chair, Piano bench
bench: Bench, Concrete bench, Painted bench
sofa: Sofa, Couch, Corner sofa, Winchester sofa, Clear sofa, Sofa 2 seats, Sofa 3 seats
sofa: Burlap sofa, Rattan sofa, Futon couch, Convertible sofa BZ
table: Table, Oak table, Round table, Glass table, Wooden table, Wooden teak table, Coffee table
table: Black table, Bar table, Folding table, Cafe table, Rattan table, Wooden alder table
table: Table with tablecloth, Children table, Table on trestles, Technical table
desk: Desk, Desk table, Wooden desk
bed: Bed, Child bed, Iron bed, Hospital bed, Captain's bed, Day bed
bunk bed: Bunk bed, Mezzanine bed
baby bed: Baby bed, Crib
bookcase: Bookcase, Full bookcase
shelves: Shelves, Vertical shelves
wardrobe: Wardrobe
cupboard: Cupboard, High cabinet, Lower cabinet, Drawers cabinet, Filing cabinet
bedside table: Bedside table
dresser: Dresser with drawers
chest: Chest, Trunck
television: TV, TV 16:9, Screen
laptop: Laptop, Apple iBook
computer: Apple iMac 1998, Apple iMac 2004
printer: Inkjet printer and scanner
telephone: Phone, Wireless phone
mobile phone: Apple iPhone, Mobile phone
safe: Safe
dustbin: Dustbin, Park trashcan, Residential trashcan, Bullet trash can, Recycling bin
stapler: Stapler
box: Box, Cardboard box, Open cardboard box
crate: Crate
barrel: Barrel
water cooler: Water cooler
rocking horse: Rocking horse
teddy bear: Teddy bear
toy train: Toy train
toy car: Car model
briefcase: Briefcase
suitcase: Suitcase
handbag: Handbag
backpack: Backpack
doll: Doll
doll house: Doll house
cap: Cap
hat: Hat
helmet: Helmet
shoe: Bootie, Mocassin
dress: Dress
jacket: Jacket
deer: Deer
piano: Grand piano, Upright piano
guitar: Electric guitar
plant: Plant, Little plant, Decorative plant, Indoor plant, Spathiphyllum, Yucca, Spider plant
plant: Succulent plant, Ficus, Bamboo
cactus: Cactus
bonsai tree: Bonsai tree
Christmas tree: Christmas tree
fireplace: Fireplace, Chimney
aquarium: Aquarium
cup: Coffee cup, Plastic cup, Coffee mug, Cup
glass: Beer glass, Glass, Cocktail glass
bottle: Baby bottle, Yogurt bottle, Beer bottle, Bottle, Wine bottle, Medicine bottle, Flacon
bottle: Spray bottle
bowl: Bowl, Bowl with fruits, Bowl with salad
teapot: Teapot
kettle: Espresso kettle
coffee maker: Coffee brewer, Coffee maker, Coffee machine, Coffee press
pan: Large pan
bread: Bread
cake: Cup cake, Birthday cake
hot dog: Hot dog
hamburger: Hamburger
roast chicken: Roasted chicken
oven: Oven, Double oven, Small oven
stove: Stove, Large stove, Cooker, Propane stove
fridge: Refrigerator, Large fridge, Fridge
microwave: Microwave
toaster: Toaster
mixer: Mixer, Blender
washing machine: Washing machine, Clothes washing machine
dryer: Dryer machine
broom: Broom
shovel: Shovel
salt shaker: Salt shaker
kitchen scale: Kitchen scale, Electronic scale
basket: Shopping basket, Clothes basket
bread box: Bread box
toilet: Toilets unit
washbasin: Washbasin
bathtub: Bath, Island bath, Corner bathtub
shower: Shower stall
bidet: Bidet
lipstick: Lip stick
lamp: Lamp, Desk lamp, Little lamp, Pedestal vase lamp
lantern: Japanese lantern, Stone lantern, Camping lamp
street lamp: Street lamp, Street light, Park light, Classic lamppost
torch: Flashlight
candle: Candle
mailbox: Mailbox
umbrella: Umbrella
swing: Child swing
seesaw: Seesaw
wheelbarrow: Wheelbarrow
rock: Rock
snowman: Snowman
fountain: Fountain
boat: Rowboat
fire hydrant: Fire hydrant
lawn mower: Mower
tent: Camping tent, Barnum
dog house: Dog house
hut: Garden hut
trampoline: Trampoline
bush: Bush
hedge: Hedge, High hedge
palm tree: Palm tree, Coconut tree, Bended coconut tree
tree: Acacia, Blue pine under snow, Copper beech, Cypress, Japanese maple, Poplar, Peach blossom
tree: Pine, Pine under snow, Sycamore maple
speaker: Speaker
fan: Table fan, Rigged fan
ball: Basketball, Soccer ball
fire extinguisher: Extinguisher
fence: Fence
shipping container: Shipping container
radiator: Radiator
tennis racket: Tennis racket
radio: Radio
treadmill: Treadmill
bicycle: Bike, Bicycle, Indoor bike
vase: Vase, Pottery, Old jar
camera: Camera, Reflex camera
pool table: Pool table
ladder: Step ladder, Small step ladder
traffic cone: Cone
drill: Drill
hammer: Hammer
saw: Saw
screwdriver: Screwdriver
chicken: Chicken
horse: Horse
cat: Siamese cat, Cat
dog: Bulldog, Dog
rabbit: Rabbit
woman: Female
man: Male
boy: Boy
girl: Girl
mannequin: Mannequin male, Mannequin female
fork lift: Fork lift
truck: Truck
bus: Bus, City bus
car: Ford Focus, Concept Sedan 01, Concept Sedan 02, Concept Sedan 02 Sport, VW new beetle
car: Seat Leon, Peugeot 308 CC, Renault Scenic, SUV, Chevrolet, Smart car
van: Van
motorbike: Motorbike, Yamaha YZR R6
scooter: Scooter
pushchair: Stroller
tricycle: Tricycle
skateboard: Skateboard
staircase: Spiral staircase
door: Door, Exterior door
gift: Gift
book: Book
"""


@cache
def plain_names() -> dict[str, str]:
    """Catalogue name -> plain name."""
    table: dict[str, str] = {}
    for line in _PLAIN_NAMES.strip().splitlines():
        plain, raw = line.split(": ", 1)
        table.update(dict.fromkeys(raw.split(", "), plain))
    return table
