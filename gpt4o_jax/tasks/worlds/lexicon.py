"""The words of the sentences that worlds translate and write: one row per word, one column per language.

English nouns: singular, plural. German: article (which gives the gender), singular, plural. French and Spanish: gender, singular,
plural. Verbs: third person singular, plural, participle, and in French and Spanish the infinitive (elsewhere it equals the
plural); a separable German particle comes last. Adjectives in French and Spanish: masculine, feminine, their plurals; "<" after
them: the adjective precedes the noun; a form after that: used before a vowel.
"""

import dataclasses

_NOUNS = """
man men          | der Mann Männer          | m homme hommes             | m hombre hombres
woman women      | die Frau Frauen          | f femme femmes             | f mujer mujeres
child children   | das Kind Kinder          | m enfant enfants           | m niño niños
girl girls       | das Mädchen Mädchen      | f fille filles             | f chica chicas
teacher teachers | der Lehrer Lehrer        | m professeur professeurs   | m profesor profesores
doctor doctors   | der Arzt Ärzte           | m médecin médecins         | m médico médicos
king kings       | der König Könige         | m roi rois                 | m rey reyes
queen queens     | die Königin Königinnen   | f reine reines             | f reina reinas
aunt aunts       | die Tante Tanten         | f tante tantes             | f tía tías
uncle uncles     | der Onkel Onkel          | m oncle oncles             | m tío tíos
baker bakers     | der Bäcker Bäcker        | m boulanger boulangers     | m panadero panaderos
actress actresses | die Schauspielerin Schauspielerinnen | f actrice actrices | f actriz actrices
"""
_THINGS = """
table tables     | der Tisch Tische         | f table tables             | f mesa mesas
lamp lamps       | die Lampe Lampen         | f lampe lampes             | f lámpara lámparas
book books       | das Buch Bücher          | m livre livres             | m libro libros
chair chairs     | der Stuhl Stühle         | f chaise chaises           | f silla sillas
bag bags         | die Tasche Taschen       | m sac sacs                 | m bolso bolsos
car cars         | das Auto Autos           | f voiture voitures         | m coche coches
apple apples     | der Apfel Äpfel          | f pomme pommes             | f manzana manzanas
flower flowers   | die Blume Blumen         | f fleur fleurs             | f flor flores
house houses     | das Haus Häuser          | f maison maisons           | f casa casas
letter letters   | der Brief Briefe         | f lettre lettres           | f carta cartas
watch watches    | die Uhr Uhren            | f montre montres           | m reloj relojes
picture pictures | das Bild Bilder          | m tableau tableaux         | m cuadro cuadros
key keys         | der Schlüssel Schlüssel  | f clé clés                 | f llave llaves
door doors       | die Tür Türen            | f porte portes             | f puerta puertas
window windows   | das Fenster Fenster      | f fenêtre fenêtres         | f ventana ventanas
hat hats         | der Hut Hüte             | m chapeau chapeaux         | m sombrero sombreros
"""
_VERBS = """
buys buy bought | kauft kaufen gekauft | achète achètent acheté acheter | compra compran comprado comprar
finds find found | findet finden gefunden | trouve trouvent trouvé trouver | encuentra encuentran encontrado encontrar
sees see seen | sieht sehen gesehen | voit voient vu voir | ve ven visto ver
paints paint painted | malt malen gemalt | peint peignent peint peindre | pinta pintan pintado pintar
carries carry carried | trägt tragen getragen | porte portent porté porter | lleva llevan llevado llevar
brings bring brought | bringt bringen gebracht | apporte apportent apporté apporter | trae traen traído traer
cleans clean cleaned | putzt putzen geputzt | nettoie nettoient nettoyé nettoyer | limpia limpian limpiado limpiar
draws draw drawn | zeichnet zeichnen gezeichnet | dessine dessinent dessiné dessiner | dibuja dibujan dibujado dibujar
sells sell sold | verkauft verkaufen verkauft | vend vendent vendu vendre | vende venden vendido vender
hides hide hidden | versteckt verstecken versteckt | cache cachent caché cacher | esconde esconden escondido esconder
loves love loved | liebt lieben geliebt | aime aiment aimé aimer | ama aman amado amar
picks_up pick_up picked_up | hebt heben aufgehoben auf | ramasse ramassent ramassé ramasser | recoge recogen recogido recoger
"""
_ADJECTIVES = """
old       | alt      | vieux vieille vieux vieilles < vieil         | viejo vieja viejos viejas
small     | klein    | petit petite petits petites <                | pequeño pequeña pequeños pequeñas
big       | groß     | grand grande grands grandes <                | grande grande grandes grandes
beautiful | schön    | beau belle beaux belles < bel                | hermoso hermosa hermosos hermosas
"""
_OF_PERSONS = """
young     | jung     | jeune jeune jeunes jeunes <                  | joven joven jóvenes jóvenes
tired     | müd      | fatigué fatiguée fatigués fatiguées          | cansado cansada cansados cansadas
happy     | glücklich | heureux heureuse heureux heureuses          | feliz feliz felices felices
"""
_OF_THINGS = """
new       | neu      | nouveau nouvelle nouveaux nouvelles < nouvel | nuevo nueva nuevos nuevas
red       | rot      | rouge rouge rouges rouges                    | rojo roja rojos rojas
black     | schwarz  | noir noire noirs noires                      | negro negra negros negras
white     | weiß     | blanc blanche blancs blanches                | blanco blanca blancos blancas
green     | grün     | vert verte verts vertes                      | verde verde verdes verdes
blue      | blau     | bleu bleue bleus bleues                      | azul azul azules azules
expensive | teur     | cher chère chers chères                      | caro cara caros caras
heavy     | schwer   | lourd lourde lourds lourdes                  | pesado pesada pesados pesadas
"""
_TIMES = """
today | heute | aujourd'hui | hoy
now | jetzt | maintenant | ahora
often | oft | souvent | a_menudo
sometimes | manchmal | parfois | a_veces
in_the_morning | am_Morgen | le_matin | por_la_mañana
in_summer | im_Sommer | en_été | en_verano
in_winter | im_Winter | en_hiver | en_invierno
"""

LANGUAGES = ("en", "de", "fr", "es")


@dataclasses.dataclass(frozen=True)
class Word:
    """forms: language -> its forms, in the order given at the top of this file."""

    forms: dict[str, list[str]]

    @property
    def name(self) -> str:
        return self.forms["en"][0]


def _words(rows: str) -> tuple[Word, ...]:
    cells = [[cell.split() for cell in row.split("|")] for row in rows.strip().splitlines()]
    clean = lambda cell: [word.replace("_", " ") for word in cell]
    return tuple(Word(dict(zip(LANGUAGES, map(clean, row), strict=True))) for row in cells)


PERSONS, THINGS, VERBS, TIMES = (_words(rows) for rows in (_NOUNS, _THINGS, _VERBS, _TIMES))
OF_PERSONS, OF_THINGS = _words(_ADJECTIVES + _OF_PERSONS.lstrip()), _words(_ADJECTIVES + _OF_THINGS.lstrip())
