// QuPath script (0.4 or newer): loads the cells that wsiseg found on the open slide, in place of its present detections.
// Automate > Script editor; set the folder that --out named; Run. Sets the pixel size if QuPath knows none, and checks the number of cells.
import com.google.gson.JsonParser

def out = '/path/to/wsiseg-out'

def file = new File(getCurrentServer().getURIs().iterator().next().path)
def run = new File(out, file.name.replaceFirst(/(?i)\.ome\.tiff?$|\.[^.]+$/, ''))
def cells = ['cells.geojson.gz', 'cells.geojson.zip'].collect { new File(run, it) }.find { it.exists() }
def manifest = new File(run, 'manifest.json')

if (cells == null || !manifest.exists()) {
    print "No cells for ${file.name} below ${out}: run wsiseg on it first"
} else {
    def facts = JsonParser.parseString(manifest.getText('UTF-8')).getAsJsonObject()
    def mpp = facts.get('slide').get('mpp').getAsDouble()
    def known = getCurrentServer().getPixelCalibration()
    if (!known.hasPixelSizeMicrons()) {
        setPixelSizeMicrons(mpp, mpp)
    } else if (Math.abs(known.getAveragedPixelSizeMicrons() / mpp - 1) > 0.01) {
        print "Warning: wsiseg ran at ${mpp} um per px, QuPath has ${known.getAveragedPixelSizeMicrons()}: areas differ"
    }
    clearDetections()
    importObjectsFromFile(cells.path)
    fireHierarchyUpdate()
    def found = getDetectionObjects()
    def expected = facts.get('counts').get('cells').getAsInt()
    print found.size() == expected ? "${expected} cells" : "Warning: ${found.size()} of ${expected} cells were loaded"
    found.groupBy { it.getPathClass() }.each { type, of -> print "${type ?: 'unassigned'}: ${of.size()}" }
}
