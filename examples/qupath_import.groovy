// QuPath script (0.4 or newer): loads the cells that wsiseg found on the open slide, in place of its present detections.
// Automate > Script editor; set the folder that --out named; Run.
def out = '/path/to/wsiseg-out'

def file = new File(getCurrentServer().getURIs().iterator().next().path)
def stem = file.name.replaceFirst(/(?i)\.ome\.tiff$|\.[^.]+$/, '')
def cells = ['cells.geojson.gz', 'cells.geojson.zip'].collect { new File(new File(out, stem), it) }.find { it.exists() }

if (cells == null) {
    print "No cells for ${file.name} below ${out}: run wsiseg on it first"
} else {
    clearDetections()
    importObjectsFromFile(cells.path)
    fireHierarchyUpdate()
    getDetectionObjects().groupBy { it.getPathClass() }.each { type, found -> print "${type ?: 'unassigned'}: ${found.size()}" }
}
